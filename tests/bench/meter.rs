//! What a piece of work cost: time, CPU time of this process and of Redis, memory of Redis.
//!
//! Units:  seconds for time, microseconds for CPU time, bytes for memory.
//! Source: Redis INFO; getrusage(2).

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeVal,
};
use redis::Connection;
use shared::time::{Clock, MonoNanos};
use stand::redis::Redis;

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    pub(crate) spans: f64,
    pub(crate) seconds: f64,
    pub(crate) client_us: f64,
    pub(crate) redis_us: f64,
    /// What Redis holds more than before.
    pub(crate) bytes: f64,
}

pub(crate) struct Meter {
    redis: Connection,
    begun: MonoNanos,
    client_us: f64,
    redis_us: f64,
    bytes: f64,
}

impl Meter {
    pub(crate) fn start(redis: &Redis) -> Self {
        let mut redis = redis.connection().unwrap();
        let (redis_us, bytes) = info(&mut redis);
        Self {
            redis,
            redis_us,
            bytes,
            client_us: own_cpu(),
            begun: Clock::mono_now(),
        }
    }

    pub(crate) fn stop(mut self, spans: usize) -> Cost {
        let (now, client_us) = (Clock::mono_now(), own_cpu());
        let (redis_us, bytes) = info(&mut self.redis);
        Cost {
            spans: spans as f64,
            seconds: now.since(self.begun).as_secs_f64(),
            client_us: client_us - self.client_us,
            redis_us: redis_us - self.redis_us,
            bytes: bytes - self.bytes,
        }
    }
}

/// CPU time, and memory without the buffers of clients.
pub(crate) fn info(redis: &mut Connection) -> (f64, f64) {
    let mut text = String::new();
    for section in ["cpu", "memory"] {
        let part: String = redis::cmd("INFO").arg(section).query(redis).unwrap();
        text.push_str(&part);
    }
    let field = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.strip_prefix(':'))
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    (
        (field("used_cpu_user") + field("used_cpu_sys")) * 1e6,
        field("used_memory") - field("mem_clients_normal"),
    )
}

fn own_cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = |time: TimeVal| time.tv_sec() as f64 * 1e6 + time.tv_usec() as f64;
    micros(usage.user_time()) + micros(usage.system_time())
}
