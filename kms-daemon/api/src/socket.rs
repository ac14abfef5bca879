//! Where the socket lies.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// `explicit` (`--socket`), else `$KMS_SOCKET`, else `$XDG_RUNTIME_DIR/kmsd/kmsd.sock`, else `/run/kmsd/kmsd.sock`.
/// An empty variable counts as unset.
#[must_use]
pub fn socket_path(explicit: Option<&Path>) -> PathBuf {
    choose(explicit, |name| std::env::var_os(name))
}

fn choose(explicit: Option<&Path>, variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let set = |name| variable(name).filter(|value| !value.is_empty());
    if let Some(path) = explicit {
        return path.to_owned();
    }
    if let Some(path) = set("KMS_SOCKET") {
        return PathBuf::from(path);
    }
    set("XDG_RUNTIME_DIR")
        .map_or_else(|| PathBuf::from("/run"), PathBuf::from)
        .join("kmsd/kmsd.sock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_set_decides() {
        let both = |name: &str| {
            Some(match name {
                "KMS_SOCKET" => "/k".into(),
                _ => "/x".into(),
            })
        };
        let runtime = |name: &str| (name == "XDG_RUNTIME_DIR").then(|| "/x".into());
        assert_eq!(choose(Some(Path::new("/e")), both), Path::new("/e"));
        assert_eq!(choose(None, both), Path::new("/k"));
        assert_eq!(choose(None, runtime), Path::new("/x/kmsd/kmsd.sock"));
        assert_eq!(choose(None, |_| None), Path::new("/run/kmsd/kmsd.sock"));
        assert_eq!(
            choose(None, |_| Some("".into())),
            Path::new("/run/kmsd/kmsd.sock")
        );
    }
}
