//! Gives the contract its build id: a hash of everything that two processes must agree on.
//!
//! In:     the sources of `shared` and `store`, and the scripts.
//! Out:    SPANBUF_BUILD, 16 hex digits.
//! Source: docs/supervision.md 1.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
};

fn main() -> io::Result<()> {
    let mut files = Vec::new();
    for folder in ["src", "../store/src", "../../lua"] {
        writeln(&format!("cargo::rerun-if-changed={folder}"))?;
        collect(Path::new(folder), &mut files)?;
    }
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.hash(&mut hasher);
        fs::read(&file)?.hash(&mut hasher);
    }
    writeln(&format!(
        "cargo::rustc-env=SPANBUF_BUILD={:016x}",
        hasher.finish()
    ))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?
        } else {
            files.push(path)
        }
    }
    Ok(())
}

fn writeln(line: &str) -> io::Result<()> {
    io::Write::write_all(&mut io::stdout(), format!("{line}\n").as_bytes())
}
