//! What `kill -USR1` shows: a line for each worker and a summary, and the same as JSON in a file.
//!
//! In:     the board as it is shown.
//! Out:    lines of `key=value` on standard error; a file that is replaced as a whole.
//! Keeps:  one write a line that never waits, whatever state the workers and the reader are in; a reader of the file finds all
//!         of one report.
//! Knows:  where a report goes. It changes nothing.
//! Source: docs/supervision.md 4.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use log::warn;
use shared::{board::View, telemetry::logs};

/// Prints everything, and writes it to the file.
pub(crate) fn print(view: &View, dump: Option<&Path>) {
    view.lines().iter().for_each(|line| logs::line(line));
    if let Some(path) = dump
        && let Err(error) = write(path, &view.json())
    {
        warn!(
            "write report path={}: {error} (check supervision.dump)",
            path.display()
        );
    }
}

/// Beside the file first, then in its place.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    fs::write(&beside, format!("{text}\n"))?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_replaces_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump.json");
        write(&path, "one, and longer").unwrap();
        write(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write(Path::new("/no/such/folder/dump"), "three").is_err());
    }
}
