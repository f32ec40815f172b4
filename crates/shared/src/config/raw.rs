//! Text for every key, and where it stands; the faults that are found on the way.
//!
//! In:     a TOML file, the environment.
//! Out:    the value of a key as text, list or map; all faults.
//! Keeps:  later sources win; a key that nobody knows is a fault with its nearest neighbour.
//! Knows:  the names of keys. Not what their values mean.
//! Source: docs/spec.md 10.1.

use std::{collections::BTreeMap, ffi::OsString, fmt, fs, path::Path};

use super::keys::{KEYS, find, nearest};

const PREFIX: &str = "SPANBUF_";
/// Variables of the scripts, which share the prefix.
const OF_SCRIPTS: [&str; 2] = ["SPANBUF_CACHE", "SPANBUF_KAFKA_DIR"];
/// Parts of the names of properties whose values are secrets.
const SECRETS: [&str; 7] = [
    "password",
    "secret",
    "token",
    "jaas",
    "credential",
    "key.pem",
    "oauthbearer.config",
];

/// Properties of the same sections whose values may be shown.
const HARMLESS: [&str; 6] = [
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.username",
    "ssl.ca.location",
    "ssl.certificate.location",
    "ssl.endpoint.identification.algorithm",
];

/// One thing that is wrong, where, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The file and key, the variable, or the flag.
    pub place: String,
    /// What is wrong, and how to mend it.
    pub reason: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.reason)
    }
}

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// At least one.
    pub faults: Vec<Fault>,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.faults.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            write!(f, "{newline}{fault}")?;
        }
        Ok(())
    }
}

/// A value as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Written {
    Text(String),
    List(Vec<String>),
    Map(BTreeMap<String, String>),
}

/// What was written for every key that something sets.
#[derive(Debug)]
pub(super) struct Raw {
    values: BTreeMap<&'static str, (String, Written)>,
    faults: Vec<Fault>,
    /// The file could not be read: what is missing may stand in it.
    is_partial: bool,
}

impl Raw {
    /// Reads the file and the environment.
    pub(super) fn read(file: Option<&Path>, environment: &[(OsString, OsString)]) -> Self {
        let mut raw = Self {
            values: BTreeMap::new(),
            faults: Vec::new(),
            is_partial: false,
        };
        if let Some(file) = file {
            raw.read_file(file);
        }
        for (name, value) in environment {
            raw.read_variable(&name.to_string_lossy(), value);
        }
        raw
    }

    /// Sets a key, such as from a flag.
    pub(super) fn set(&mut self, path: &'static str, place: &str, value: String) {
        self.values
            .insert(path, (place.to_owned(), Written::Text(value)));
    }

    /// Notes a fault of a key.
    pub(super) fn fault(&mut self, path: &str, reason: impl Into<String>) {
        let place = self.place(path);
        self.faults.push(Fault {
            place,
            reason: reason.into(),
        });
    }

    /// Whether the file could not be read.
    pub(super) fn is_partial(&self) -> bool {
        self.is_partial
    }

    /// The value of a key as one text.
    pub(super) fn text(&mut self, path: &'static str) -> String {
        match self.values.get(path) {
            Some((_, Written::Text(text))) => text.trim().to_owned(),
            None => default_of(path),
            Some(_) => {
                self.fault(path, "one value is expected");
                default_of(path)
            }
        }
    }

    /// The value of a key as a list; text is cut at its commas.
    pub(super) fn list(&mut self, path: &'static str) -> Vec<String> {
        match self.values.get(path) {
            Some((_, Written::List(list))) => {
                list.iter().map(|item| item.trim().to_owned()).collect()
            }
            Some((_, Written::Map(_))) => {
                self.fault(path, "a list is expected");
                Vec::new()
            }
            _ => split(&self.text(path)),
        }
    }

    /// The value of a key as a map; text is cut into `key=value,…`.
    pub(super) fn map(&mut self, path: &'static str) -> BTreeMap<String, String> {
        let items = match self.values.get(path) {
            Some((_, Written::Map(map))) => return map.clone(),
            Some((_, Written::List(list))) => list.clone(),
            _ => split(&self.text(path)),
        };
        let mut map = BTreeMap::new();
        for item in items {
            match item.split_once('=') {
                Some((name, value)) if !name.trim().is_empty() => {
                    drop(map.insert(name.trim().to_owned(), value.trim().to_owned()))
                }
                // The item may hold a secret: it is not shown.
                _ => self.fault(path, "an item is no `key=value` (write key=value,…)"),
            }
        }
        map
    }

    /// Every key in force as text, secrets hidden; or all faults.
    pub(super) fn finish(self) -> Result<Vec<(String, String)>, ConfigError> {
        if !self.faults.is_empty() {
            return Err(ConfigError {
                faults: self.faults,
            });
        }
        let shown = |path: &str| match self.values.get(path) {
            None => default_of(path),
            Some((_, Written::Text(text))) if !is_map(path) => text.clone(),
            Some((_, Written::Text(text))) => split(text)
                .iter()
                .map(|item| hidden(item.split_once('=').unwrap_or((item, ""))))
                .collect::<Vec<_>>()
                .join(","),
            Some((_, Written::List(list))) if is_map(path) => list
                .iter()
                .map(|item| hidden(item.split_once('=').unwrap_or((item, ""))))
                .collect::<Vec<_>>()
                .join(","),
            Some((_, Written::List(list))) => list.join(","),
            Some((_, Written::Map(map))) => map
                .iter()
                .map(|(name, value)| hidden((name, value)))
                .collect::<Vec<_>>()
                .join(","),
        };
        Ok(KEYS
            .iter()
            .map(|key| (key.path.to_owned(), shown(key.path)))
            .collect())
    }

    fn place(&self, path: &str) -> String {
        self.values
            .get(path)
            .map_or_else(|| path.to_owned(), |(place, _)| place.clone())
    }

    fn read_file(&mut self, file: &Path) {
        let table = fs::read_to_string(file)
            .map_err(|error| format!("cannot be read: {error} (check --config)"))
            .and_then(|text| parse(&text));
        match table {
            Ok(table) => table
                .into_iter()
                .for_each(|(section, value)| self.read_section(file, &section, value)),
            Err(reason) => {
                self.is_partial = true;
                self.faults.push(Fault {
                    place: file.display().to_string(),
                    reason,
                });
            }
        }
    }

    fn read_section(&mut self, file: &Path, section: &str, value: toml::Value) {
        let place = |path: &str| format!("{}: {path}", file.display());
        let toml::Value::Table(table) = value else {
            return self.faults.push(Fault {
                place: place(section),
                reason: unknown(section),
            });
        };
        if table.is_empty()
            && !KEYS
                .iter()
                .any(|key| key.path.split('.').next() == Some(section))
        {
            self.faults.push(Fault {
                place: place(section),
                reason: "this section does not exist".into(),
            });
        }
        for (name, value) in table {
            let path = format!("{section}.{name}");
            let Some(key) = find(&path) else {
                self.faults.push(Fault {
                    place: place(&path),
                    reason: unknown(&path),
                });
                continue;
            };
            match written(&path, value) {
                Some(written) => drop(self.values.insert(key.path, (place(&path), written))),
                None => self.faults.push(Fault {
                    place: place(&path),
                    reason: "text, a number or a list of them is expected".into(),
                }),
            }
        }
    }

    fn read_variable(&mut self, name: &str, value: &OsString) {
        let Some(rest) = name
            .strip_prefix(PREFIX)
            .filter(|_| !OF_SCRIPTS.contains(&name))
        else {
            return;
        };
        let path = rest.replacen("__", ".", 1).to_lowercase();
        match (find(&path), value.to_str()) {
            (Some(key), Some(value)) => drop(
                self.values
                    .insert(key.path, (name.to_owned(), Written::Text(value.to_owned()))),
            ),
            (Some(_), None) => self.faults.push(Fault {
                place: name.to_owned(),
                reason: "the value is not UTF-8".into(),
            }),
            (None, _) => {
                let reason = match nearest(&path.replacen('_', ".", usize::from(!path.contains('.')))) {
                    Some(key) => format!("no key is called so (did you mean {}?)", variable(key.path)),
                    None => "no key is called so (write SPANBUF_<SECTION>__<KEY>; README lists the keys)".into(),
                };
                self.faults.push(Fault {
                    place: name.to_owned(),
                    reason,
                });
            }
        }
    }
}

/// The variable that sets a key.
fn variable(path: &str) -> String {
    format!("{PREFIX}{}", path.replacen('.', "__", 1).to_uppercase())
}

fn unknown(path: &str) -> String {
    match nearest(path) {
        Some(key) => format!("no key is called so (did you mean {}?)", key.path),
        None => "no key is called so (README lists the keys)".into(),
    }
}

/// What stands in where a value is a fault: contradictions are then those of other values.
pub(super) fn default_of(path: &str) -> String {
    find(path).map_or_else(String::new, |key| key.default.to_owned())
}

fn is_map(path: &str) -> bool {
    matches!(
        path,
        "kafka.properties" | "kafka.consumer" | "kafka.producer"
    )
}

fn hidden((name, value): (&str, &str)) -> String {
    let lower = name.to_lowercase();
    // Of these sections whatever is not known to be harmless is hidden: a misspelt name hides nothing by itself.
    let is_sensitive = lower.starts_with("sasl.") || lower.starts_with("ssl.");
    let is_secret = SECRETS.iter().any(|secret| lower.contains(secret))
        || (is_sensitive && !HARMLESS.contains(&&lower[..]));
    format!("{name}={}", if is_secret { "***" } else { value })
}

fn split(text: &str) -> Vec<String> {
    text.split(',')
        .map(|item| item.trim().to_owned())
        .filter(|item| !item.is_empty())
        .collect()
}

fn parse(text: &str) -> Result<toml::Table, String> {
    text.parse::<toml::Table>().map_err(|error| {
        let line = error.span().map_or(0, |span| {
            text.get(..span.start).unwrap_or(text).matches('\n').count() + 1
        });
        // Not the line itself: it may hold a secret.
        format!(
            "line {line} is no TOML: {}",
            error.message().replace('\n', ", ")
        )
    })
}

/// A value of the file; none for one that no key has.
fn written(path: &str, value: toml::Value) -> Option<Written> {
    match value {
        toml::Value::Array(items) => items
            .into_iter()
            .map(scalar)
            .collect::<Option<_>>()
            .map(Written::List),
        toml::Value::Table(table) if is_map(path) => table
            .into_iter()
            .map(|(name, value)| Some((name, scalar(value)?)))
            .collect::<Option<_>>()
            .map(Written::Map),
        other => scalar(other).map(Written::Text),
    }
}

fn scalar(value: toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(flag) => Some(flag.to_string()),
        toml::Value::Datetime(_) | toml::Value::Array(_) | toml::Value::Table(_) => None,
    }
}
