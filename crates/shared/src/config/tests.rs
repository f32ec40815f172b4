//! Tests of the configuration: sources, faults, secrets, README.

use std::{fs, path::PathBuf};

use proptest::prelude::*;

use super::*;

fn variables(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    pairs
        .iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

fn load(file: Option<&str>, pairs: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path: Option<PathBuf> = file.map(|text| {
        let path = folder.path().join("spanbuf.toml");
        fs::write(&path, text).unwrap();
        path
    });
    let flags = Flags {
        shards: Some("0-7".parse().unwrap()),
        ..Flags::default()
    };
    Config::load(path.as_deref(), variables(pairs).into_iter(), &flags)
}

/// The faults, without the folder of the file.
fn faults(file: &str, pairs: &[(&str, &str)]) -> Vec<String> {
    let faults = load(Some(file), pairs).unwrap_err().faults;
    faults
        .iter()
        .map(|fault| fault.to_string())
        .map(|fault| {
            fault
                .split_once("spanbuf.toml: ")
                .map_or(fault.clone(), |(_, rest)| rest.to_owned())
        })
        .collect()
}

#[test]
fn nothing_but_shards_is_needed() {
    let config = load(None, &[]).unwrap();
    assert_eq!(
        (
            config.supervision.max_workers,
            config.supervision.ingest_workers
        ),
        (8, 1)
    );
    assert_eq!(
        (&config.kafka.brokers[..], &config.redis.nodes[..]),
        ("127.0.0.1:9092", &["127.0.0.1:6379".to_owned()][..])
    );
    assert_eq!(
        config.buffer.max_segment_age,
        Some(Duration::from_secs(600))
    );
    assert_eq!(
        (config.buffer.max_segment_bytes, config.intake.batch_time),
        (10 << 20, Duration::from_millis(10))
    );
}

#[test]
fn a_cluster_has_more_buckets() {
    let redis = |file| load(Some(file), &[]).unwrap().redis;
    let of = |redis: Redis| (redis.cluster, redis.buckets, redis.slice);
    assert_eq!(of(redis("")), (false, 1, None));
    assert_eq!(of(redis("redis.cluster = true")), (true, 16, None));
    let file = "redis.cluster = true\nredis.buckets = 4\nredis.slice = 2\nredis.nodes = [\"a:1\", \"b:1\"]";
    assert_eq!(of(redis(file)), (true, 4, Some(SliceId(2))));
}

#[test]
fn later_sources_win() {
    let flags = Flags {
        shards: None,
        max_workers: Some(3),
        ingest_workers: None,
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.toml");
    fs::write(&path, "[supervision]\nshards = \"0-3\"\nmax_workers = 1\ningest_workers = 1\nrun_dir = \"/a\"\n[buffer]\ntimeout = \"1s\"\nroot_timeout = \"1s\"").unwrap();
    let pairs = variables(&[
        ("SPANBUF_SUPERVISION__MAX_WORKERS", "2"),
        ("SPANBUF_SUPERVISION__INGEST_WORKERS", "2"),
        ("SPANBUF_BUFFER__TIMEOUT", "250ms"),
    ]);
    let config = Config::load(Some(&path), pairs.into_iter(), &flags).unwrap();
    assert_eq!(
        (
            config.supervision.max_workers,
            config.supervision.ingest_workers
        ),
        (3, 2)
    );
    assert_eq!(
        (config.buffer.timeout, config.buffer.root_timeout),
        (Duration::from_millis(250), Duration::from_secs(1))
    );
    assert_eq!(config.supervision.run_dir, PathBuf::from("/a"));
}

#[test]
fn lists_and_maps_are_read_from_files_and_variables() {
    let file = "kafka.output_topics = [\"a\", \"b\"]\nkafka.producer = { \"linger.ms\" = 5, \"compression.type\" = \"zstd\" }";
    let config = load(Some(file), &[("SPANBUF_KAFKA__PROPERTIES", "a.b=c, d=e=f")]).unwrap();
    assert_eq!(config.kafka.output_topics, ["a", "b"]);
    assert_eq!(config.kafka.producer["linger.ms"], "5");
    assert_eq!(config.kafka.properties["d"], "e=f");
}

#[test]
fn all_faults_are_told_at_once_each_with_its_place_and_neighbour() {
    let file = "
        kafka.broker = \"a:1\"
        kafka.offset_reset = \"newest\"
        buffer.timeout = \"60\"
        buffer.root_timeout = 0
        flush.max_flush_segments = 0
        buffer.max_insert_bytes = \"1MB\"
        redis.cluster = \"maybe\"
        redis.buckets = 2000
        redis.slice = \"a\"
        http.listen = \"127.0.0.1:1\"
        intake.timeout = \"1s\"
        kafka.properties = { acks = \"1\" }";
    let found = faults(
        file,
        &[
            ("SPANBUF_KAFKA__GRUOP", "x"),
            ("SPANBUF_KAFKA_GROUP", "x"),
            ("SPANBUF_CACHE", "x"),
            ("HOME", "x"),
        ],
    );
    let expected = [
        "kafka.broker: no key is called so (did you mean kafka.brokers?)",
        "kafka.offset_reset: `newest` is not one of earliest, latest, none",
        "buffer.timeout: `60` is no length of time (write 250ms, 60s, 5m or 24h)",
        "buffer.root_timeout: 0 does not mean off here (write at least 1ms)",
        "flush.max_flush_segments: `0` is no whole number from 1 to 100000",
        "buffer.max_insert_bytes: `1MB` is no size (write 512B, 64KiB, 10MiB or 2GiB)",
        "redis.cluster: `maybe` is not one of false, true",
        "redis.buckets: `2000` is no whole number from 1 to 1024",
        "redis.slice: `a` is no whole number from 0 to 4294967295",
        "intake.timeout: no key is called so (did you mean buffer.timeout?)",
        "kafka.properties: `acks` is set by spanbuf: all (leave it out here)",
        "SPANBUF_KAFKA__GRUOP: no key is called so (did you mean SPANBUF_KAFKA__GROUP?)",
        "SPANBUF_KAFKA_GROUP: no key is called so (did you mean SPANBUF_KAFKA__GROUP?)",
    ];
    for fault in expected {
        assert!(
            found.iter().any(|found| found == fault),
            "{fault}\nnot in\n{}",
            found.join("\n")
        );
    }
    assert!(
        found
            .iter()
            .any(|found| found.starts_with("http.listen: no key is called so")),
        "{found:?}"
    );
    assert_eq!(found.len(), expected.len() + 1, "{}", found.join("\n"));
}

#[test]
fn keys_of_later_work_are_refused() {
    let later = [
        "kafka.outcomes_topic",
        "redis.user",
        "redis.password_file",
        "redis.tls",
        "flush.max_flush_segments_per_trace",
        "intake.drop",
        "intake.max_memory_percentage",
        "intake.relief_percentage",
        "intake.relief_after",
        "intake.dlq_ratio",
        "http.listen",
        "http.statsd",
        "log.format",
    ];
    for path in later {
        assert!(
            faults(&format!("{path} = \"1\""), &[])[0]
                .starts_with(&format!("{path}: no key is called so")),
            "{path}"
        );
    }
}

#[test]
fn values_that_contradict_are_refused() {
    let rows = [
        (
            "buffer.max_segment_age = \"5s\"",
            "buffer.max_segment_age: 5s is shorter than buffer.root_timeout=10s",
        ),
        (
            "buffer.max_trace_bytes = \"1KiB\"",
            "buffer.max_insert_bytes: is larger than buffer.max_trace_bytes",
        ),
        (
            "redis.redis_ttl = \"10m\"",
            "redis.redis_ttl: 600s is shorter than the longest life of a segment",
        ),
        (
            "redis.nodes = [\"a:1\", \"b:1\"]",
            "redis.nodes: several nodes are given, and redis.cluster is false",
        ),
        (
            "kafka.start_group = \"spanbuf\"",
            "kafka.start_group: is kafka.group itself",
        ),
        (
            "kafka.input_dlq = \"ingest-spans\"",
            "kafka.input_dlq: is kafka.input_topic",
        ),
        (
            "kafka.output_topics = [\"ingest-spans\"]",
            "kafka.output_topics: is kafka.input_topic",
        ),
        (
            "supervision.hang = \"12s\"",
            "supervision.hang: 12s is shorter than 13 times redis.timeout=1s",
        ),
        (
            "supervision.boot = \"2s\"\nredis.timeout = \"100ms\"",
            "supervision.boot: 2s is shorter than 3 times an answer of kafka=2s: a worker that only waits would be killed (raise it)",
        ),
        (
            "supervision.hang = \"2s\"\nredis.timeout = \"100ms\"",
            "supervision.hang: 2s is shorter than 3 times a sleep of=1s",
        ),
        (
            "supervision.hang = \"29s\"\nintake.batch_time = \"10s\"",
            "supervision.hang: 29s is shorter than 3 times intake.batch_time=10s",
        ),
        (
            "supervision.blocked = \"30s\"",
            "supervision.blocked: 30s is not longer than flush.delivery_timeout=30s",
        ),
    ];
    for (file, fault) in rows {
        let found = faults(file, &[]);
        assert!(
            found.len() == 1 && found[0].starts_with(fault),
            "{file}: {found:?}"
        );
    }
}

#[test]
fn a_budget_that_is_not_set_follows_the_delivery_timeout() {
    let blocked = |file: &str| load(Some(file), &[]).unwrap().supervision.blocked;
    assert_eq!(blocked(""), Duration::from_secs(300));
    assert_eq!(
        blocked("flush.delivery_timeout = \"10m\""),
        Duration::from_secs(660)
    );
    assert_eq!(
        blocked("supervision.blocked = \"31s\""),
        Duration::from_secs(31)
    );
    let config = load(
        Some("supervision.hang = \"3s\"\nredis.timeout = \"200ms\"\nsupervision.hang_signal = \"ABRT\""),
        &[],
    )
    .unwrap();
    assert_eq!(config.supervision.hang_signal, Some(HangSignal::Abrt));
}

#[test]
fn a_file_that_cannot_be_read_is_named_and_the_rest_is_proved() {
    let path = PathBuf::from("/nonexistent/spanbuf.toml");
    let error = Config::load(
        Some(&path),
        variables(&[("SPANBUF_LOG__LEVEL", "loud")]).into_iter(),
        &Flags::default(),
    )
    .unwrap_err();
    assert_eq!(error.faults.len(), 2, "{error}");
    assert!(
        error.faults[0]
            .to_string()
            .starts_with("/nonexistent/spanbuf.toml: cannot be read"),
        "{error}"
    );
    let error = load(Some("a = [\nsecret"), &[]).unwrap_err();
    assert!(
        error.to_string().contains("line 2 is no TOML") && !error.to_string().contains("secret"),
        "{error}"
    );
}

#[test]
fn secrets_are_not_shown() {
    let file = "kafka.properties = { \"sasl.password\" = \"hunter2\", \"sasl.username\" = \"me\" }";
    let config = load(
        Some(file),
        &[(
            "SPANBUF_KAFKA__PRODUCER",
            "ssl.key.password=hunter2,sasl.pasword=hunter2",
        )],
    )
    .unwrap();
    let shown = format!("{:?}", config.redacted());
    assert!(
        !shown.contains("hunter2")
            && shown.contains("sasl.username=me")
            && shown.contains("sasl.password=***"),
        "{shown}"
    );
    let listed = load(Some("kafka.consumer = [\"sasl.password=hunter2\"]"), &[]).unwrap();
    assert!(!format!("{:?}", listed.redacted()).contains("hunter2"));
    let refused = faults("redis.nodes = [\"redis://me:hunter2@a:1\"]", &[]);
    assert!(!refused.join("").contains("hunter2"), "{refused:?}");
}

#[test]
fn the_run_directory_follows_the_environment() {
    let run_dir = |pairs: &[(&str, &str)]| load(None, pairs).unwrap().supervision.run_dir;
    assert_eq!(
        run_dir(&[
            ("RUNTIME_DIRECTORY", "/run/a"),
            ("XDG_RUNTIME_DIR", "/run/b")
        ]),
        PathBuf::from("/run/a")
    );
    assert_eq!(
        run_dir(&[("XDG_RUNTIME_DIR", "/run/b")]),
        PathBuf::from("/run/b/spanbuf")
    );
    assert!(run_dir(&[("TMPDIR", "/t")]).starts_with("/t"));
}

#[test]
fn readme_lists_every_key_and_exit_code() {
    let readme =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
    let rows: Vec<&str> = readme
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let keys: Vec<String> = KEYS
        .iter()
        .map(|key| {
            let default = if key.default.is_empty() {
                "–".to_owned()
            } else {
                format!("`{}`", key.default)
            };
            format!("| `{}` | {default} | {} |", key.path, key.meaning)
        })
        .collect();
    let listed: Vec<&str> = rows
        .iter()
        .copied()
        .filter(|row| row.split('`').nth(1).is_some_and(|name| name.contains('.')))
        .collect();
    assert_eq!(listed, keys, "write the table so:\n{}", keys.join("\n"));
    let exits: Vec<String> = crate::exit::EXITS
        .iter()
        .map(|(exit, meaning)| format!("| `{}` | {meaning} |", exit.code()))
        .collect();
    let listed: Vec<&str> = rows
        .iter()
        .copied()
        .filter(|row| {
            row.split('`')
                .nth(1)
                .is_some_and(|name| name.parse::<u8>().is_ok())
        })
        .collect();
    assert_eq!(listed, exits, "write the table so:\n{}", exits.join("\n"));
}

proptest! {
    #[test]
    fn any_text_is_a_value_or_a_fault(index in 0..KEYS.len(), text in "\\PC{0,20}|[0-9]{1,22}(ms|s|h|d|B|KiB|GiB)?") {
        let variable = format!("SPANBUF_{}", KEYS[index].path.replacen('.', "__", 1).to_uppercase());
        if let Err(error) = load(None, &[(&variable, &text)]) {
            prop_assert!(!error.faults.is_empty());
            prop_assert!(error.faults.iter().all(|fault| !fault.place.is_empty() && !fault.reason.contains('\n')));
        }
    }

    #[test]
    fn a_configuration_goes_through_a_launch_record(workers in 1..9_u32, seconds in 1..100_u64, nodes in "[a-z]{1,9}:[1-9][0-9]{0,3}") {
        let config = load(None, &[
            ("SPANBUF_SUPERVISION__MAX_WORKERS", &workers.to_string()), ("SPANBUF_BUFFER__TIMEOUT", &format!("{seconds}s")), ("SPANBUF_REDIS__NODES", &nodes),
        ]).unwrap();
        let bytes = bincode::serde::encode_to_vec(&config, bincode::config::standard()).unwrap();
        let (read, length): (Config, usize) = bincode::serde::decode_from_slice(&bytes, bincode::config::standard()).unwrap();
        prop_assert_eq!((read, length), (config, bytes.len()));
    }
}
