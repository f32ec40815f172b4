//! What a worker is told at its start: one record, written and read by this file.
//!
//! In:     role, slot, generation, shards, the board's descriptor, the configuration.
//! Out:    bytes: magic, layout version, build id, length, then bincode.
//! Keeps:  a record of another build is refused before anything in it is read; any bytes give a record or an error.
//! Knows:  the contract's own build id. Pure.
//! Source: docs/supervision.md 1.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{config::Config, shard::ShardList};

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Kafka into Redis.
    Ingest,
    /// Redis into Kafka.
    Flush,
    /// One run for `--check`.
    Check,
}

/// What one worker is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// What it does.
    pub role: Role,
    /// Its number within its role.
    pub index: u32,
    /// Its place on the board.
    pub slot: u32,
    /// Which life of its slot it is.
    pub generation: u32,
    /// The shards that it works on.
    pub shards: ShardList,
    /// How many flush workers share all shards.
    pub flush_workers: u32,
    /// The supervisor's process id: the only parent that it works for.
    pub supervisor: u32,
    /// The number of the board's inherited descriptor.
    pub board: i32,
    /// The configuration.
    pub config: Config,
}

/// Why a record is not written or read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// Nothing of ours.
    #[error(
        "read launch record: no record of spanbuf (workers are started by the supervisor, not by hand)"
    )]
    NoRecord,
    /// Another build wrote it.
    #[error(
        "read launch record build={found:016x}: this worker is of build={own:016x} (install supervisor and worker of one build)"
    )]
    OtherBuild {
        /// The supervisor's build.
        found: u64,
        /// This build.
        own: u64,
    },
    /// The bytes are no record.
    #[error("read launch record: it is damaged: {0} (start the supervisor anew)")]
    Damaged(String),
    /// It cannot be encoded.
    #[error("write launch record: {0} (this is a defect)")]
    Unwritable(String),
}

const MAGIC: [u8; 8] = *b"spanbufL";
/// Of what stands around the bincode.
const LAYOUT: u32 = 1;
/// The longest record: shard lists and configurations are far below.
const BODY_BYTES_MAX: usize = 16 << 20;
/// Magic, layout, build, length.
const HEAD: usize = 8 + 4 + 8 + 4;

/// The build of the contract: a hash of its source. Two processes with the same build agree on record, board and store.
pub const BUILD: u64 = match u64::from_str_radix(env!("SPANBUF_BUILD"), 16) {
    Ok(build) => build,
    Err(_) => 0,
};

fn encoding() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<BODY_BYTES_MAX>()
}

impl Launch {
    /// The record.
    ///
    /// # Errors
    /// [`LaunchError::Unwritable`].
    pub fn write(&self) -> Result<Vec<u8>, LaunchError> {
        let body = bincode::serde::encode_to_vec(self, encoding())
            .map_err(|error| LaunchError::Unwritable(error.to_string()))?;
        let length = u32::try_from(body.len())
            .ok()
            .filter(|_| body.len() <= BODY_BYTES_MAX);
        let length = length
            .ok_or_else(|| LaunchError::Unwritable(format!("{} bytes are too long", body.len())))?;
        let mut record = Vec::with_capacity(HEAD + body.len());
        record.extend_from_slice(&MAGIC);
        record.extend_from_slice(&LAYOUT.to_le_bytes());
        record.extend_from_slice(&BUILD.to_le_bytes());
        record.extend_from_slice(&length.to_le_bytes());
        record.extend_from_slice(&body);
        Ok(record)
    }

    /// Reads a record of any bytes.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn read(bytes: &[u8]) -> Result<Self, LaunchError> {
        let (head, body) = bytes
            .split_first_chunk::<HEAD>()
            .ok_or(LaunchError::NoRecord)?;
        let [
            magic @ ..,
            l0,
            l1,
            l2,
            l3,
            b0,
            b1,
            b2,
            b3,
            b4,
            b5,
            b6,
            b7,
            n0,
            n1,
            n2,
            n3,
        ] = *head;
        let layout = u32::from_le_bytes([l0, l1, l2, l3]);
        if magic != MAGIC {
            return Err(LaunchError::NoRecord);
        }
        let found = u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]);
        if (layout, found) != (LAYOUT, BUILD) {
            return Err(LaunchError::OtherBuild { found, own: BUILD });
        }
        if usize::try_from(u32::from_le_bytes([n0, n1, n2, n3])) != Ok(body.len()) {
            return Err(LaunchError::Damaged(format!(
                "it has bytes={}, not as many as it says",
                body.len()
            )));
        }
        match bincode::serde::decode_from_slice(body, encoding()) {
            Ok((launch, length)) if length == body.len() => Ok(launch),
            Ok(_) => Err(LaunchError::Damaged("bytes follow its end".into())),
            Err(error) => Err(LaunchError::Damaged(error.to_string())),
        }
    }

    /// What the worker is called in `ps`.
    #[must_use]
    pub fn process_name(&self) -> String {
        format!(
            "spanbuf: {} {} shards {}",
            self.role, self.index, self.shards
        )
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingest => "ingest",
            Self::Flush => "flush",
            Self::Check => "check",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;
    use crate::config::Flags;

    fn launch(slot: u32, generation: u32, shards: &str) -> Launch {
        let flags = Flags {
            shards: Some("0-9".parse().unwrap()),
            ..Flags::default()
        };
        let config = Config::load(None, std::iter::empty(), &flags).unwrap();
        Launch {
            role: Role::Flush,
            index: 3,
            slot,
            generation,
            shards: shards.parse().unwrap(),
            flush_workers: 4,
            supervisor: 7,
            board: 9,
            config,
        }
    }

    #[test]
    fn other_builds_and_other_things_are_told_apart() {
        let record = launch(1, 2, "3,7").write().unwrap();
        assert_ne!(BUILD, 0);
        assert_eq!(Launch::read(b""), Err(LaunchError::NoRecord));
        assert_eq!(Launch::read(&[b'x'; 100]), Err(LaunchError::NoRecord));
        let mut other = record.clone();
        other[12] ^= 1;
        assert_eq!(
            Launch::read(&other),
            Err(LaunchError::OtherBuild {
                found: BUILD ^ 1,
                own: BUILD
            })
        );
        let mut layout = record.clone();
        layout[8] ^= 1;
        assert!(matches!(
            Launch::read(&layout),
            Err(LaunchError::OtherBuild { .. })
        ));
        assert!(matches!(
            Launch::read(&record[..record.len() - 1]),
            Err(LaunchError::Damaged(_))
        ));
        assert_eq!(
            launch(1, 2, "3,7").process_name(),
            "spanbuf: flush 3 shards 3,7"
        );
    }

    proptest! {
        #[test]
        fn records_round_trip(slot: u32, generation: u32, first in 0..100_u32) {
            let launch = launch(slot, generation, &format!("{first},200-300"));
            prop_assert_eq!(Launch::read(&launch.write().unwrap()), Ok(launch));
        }

        #[test]
        fn any_bytes_are_a_record_or_an_error(changes in vec((any::<Index>(), any::<u8>()), 1..5), cut: Index) {
            let mut record = launch(1, 2, "3").write().unwrap();
            for (at, byte) in changes {
                let at = at.index(record.len());
                record[at] = byte;
            }
            drop(Launch::read(&record));
            prop_assert!(Launch::read(&record[..cut.index(record.len())]).is_err());
        }
    }
}
