//! What lies in a keystore's home: slots and roots, told by their names and by the first bytes of files (docs/kms-format.md,
//! "Slot and root"), since a slot that was renamed opens what it always opened.

use super::super::document::Outcome;
use super::super::verify::{list, number, string};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;
use uuid::Uuid;

/// Files below a home, at most: what has more is none.
const FILES_MAX: usize = 100_000;
const SLOT_MAGIC: &[u8; 8] = b"kmsdslot";
const ROOT_MAGIC: &[u8; 8] = b"kmsdroot";
const FORMAT: u8 = 1;
/// Magic, format, kind, keystore id and epoch; a root has no kind.
const HEADER_LEN: usize = 8 + 1 + 1 + 16 + 8;

/// What a file is by its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// A slot of an epoch of the keystore.
    Slot(u64),
    /// A root of one.
    Root(u64),
    /// It is named as one of them, or begins as one, and is neither.
    Unknown,
    /// It could not be read.
    Unread,
}

impl What {
    const fn name(self) -> &'static str {
        match self {
            Self::Slot(_) => "slot",
            Self::Root(_) => "root",
            Self::Unknown => "unknown",
            Self::Unread => "unread",
        }
    }

    const fn epoch(self) -> Option<u64> {
        match self {
            Self::Slot(epoch) | Self::Root(epoch) => Some(epoch),
            Self::Unknown | Self::Unread => None,
        }
    }

    fn of(value: &Value) -> Result<Self, String> {
        match string(value, "what")? {
            "slot" => Ok(Self::Slot(number(value, "epoch")?)),
            "root" => Ok(Self::Root(number(value, "epoch")?)),
            "unknown" => Ok(Self::Unknown),
            "unread" => Ok(Self::Unread),
            other => Err(format!("nothing that lies in a home is '{other}'")),
        }
    }

    /// Of the first bytes of a file; nothing if it is none of the keystore's.
    fn of_bytes(bytes: &[u8], keystore: Uuid) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk::<8>()?;
        let (is_slot, rest) = match magic {
            SLOT_MAGIC => (true, rest.split_at_checked(2)),
            ROOT_MAGIC => (false, rest.split_at_checked(1)),
            _ => return None,
        };
        let parsed = rest.and_then(|(format, rest)| {
            let (id, rest) = rest.split_first_chunk::<16>()?;
            let epoch = u64::from_be_bytes(*rest.first_chunk::<8>()?);
            (format.first() == Some(&FORMAT)).then_some((id, epoch))
        });
        match (parsed, is_slot) {
            (Some((id, _)), _) if id != keystore.as_bytes() => None,
            (Some((_, epoch)), true) => Some(Self::Slot(epoch)),
            (Some((_, epoch)), false) => Some(Self::Root(epoch)),
            (None, _) => Some(Self::Unknown),
        }
    }
}

/// One file.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// From the home on.
    name: String,
    what: What,
}

impl Found {
    /// What its name says, whatever its content is.
    fn named_epoch(&self) -> Option<u64> {
        let (_, last) = self.name.rsplit_once('/').unwrap_or(("", &self.name));
        let rest = ["slot-", "root-"]
            .iter()
            .find_map(|prefix| last.strip_prefix(prefix))?;
        rest.strip_suffix(".staged").unwrap_or(rest).parse().ok()
    }
}

/// A home that was looked at.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Home {
    directory: String,
    found: Vec<Found>,
}

impl Home {
    /// Looks at every file below `directory`.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(super) fn read(directory: &Path, keystore: &str) -> Result<Self, String> {
        let named = |why: &dyn std::fmt::Display| format!("kmsd's home {}: {why}", directory.display());
        let keystore = Uuid::try_parse(keystore).map_err(|error| named(&error))?;
        let mut found = Vec::new();
        let mut files = 0;
        let mut directories = vec![directory.to_owned()];
        while let Some(next) = directories.pop() {
            let entries = match std::fs::read_dir(&next) {
                Err(error) if error.kind() == ErrorKind::NotFound && next != directory => continue,
                entries => entries.map_err(|error| named(&error))?,
            };
            for entry in entries {
                let entry = entry.map_err(|error| named(&error))?;
                // What goes while it is looked at is no slot that stays.
                let Ok(kind) = entry.file_type() else { continue };
                files += 1;
                match kind.is_dir() {
                    true => directories.push(entry.path()),
                    false => found.extend(look(directory, &entry.path(), kind.is_file(), keystore)),
                }
            }
            if files > FILES_MAX {
                return Err(named(&format!("it has more than {FILES_MAX} files: it is none")));
            }
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(Self {
            directory: directory.to_string_lossy().into_owned(),
            found,
        })
    }

    /// What a record says of it.
    pub(super) fn value(home: Option<&Self>) -> Value {
        let Some(home) = home else {
            return json!({ "looked_at": false });
        };
        let found = home.found.iter().map(
            |found| json!({ "name": found.name, "what": found.what.name(), "epoch": found.what.epoch() }),
        );
        json!({
            "looked_at": true,
            "directory": home.directory,
            "found": found.collect::<Value>(),
        })
    }

    /// The home as a record has it.
    ///
    /// # Errors
    /// It says nothing that could be of one.
    pub(super) fn of(value: &Value) -> Result<Option<Self>, String> {
        if value.get("looked_at") == Some(&Value::Bool(false)) {
            return Ok(None);
        }
        let found = list(value, "found")?.iter().map(|found| {
            Ok(Found {
                name: string(found, "name")?.to_owned(),
                what: What::of(found)?,
            })
        });
        Ok(Some(Self {
            directory: string(value, "directory")?.to_owned(),
            found: found.collect::<Result<_, String>>()?,
        }))
    }

    /// Whether what opened the epoch that was left, or one before it, lies there still; `present` is the keystore's.
    pub(super) fn judge(home: Option<&Self>, left: Option<u64>, present: u64) -> (Outcome, String) {
        let not_tested = |why: String| (Outcome::NotTested, why);
        let Some(home) = home else {
            return not_tested("kmsd's home was not named (--kms-home DIR)".to_owned());
        };
        let Some(left) = left else {
            return not_tested("kmsd does not know which epoch that was".to_owned());
        };
        let is_old = |epoch: Option<u64>| epoch.is_some_and(|epoch| epoch <= left);
        let old = home.names(|found| is_old(found.what.epoch()) || is_old(found.named_epoch()));
        if !old.is_empty() {
            return (Outcome::Fail, format!("there is {old}"));
        }
        for what in [What::Slot(present), What::Root(present)] {
            let name = format!("{}-{present}", what.name());
            if !home.found.contains(&Found {
                name: name.clone(),
                what,
            }) {
                return not_tested(format!("this is not the home that kmsd serves: it has no {name}"));
            }
        }
        let unclear = home.names(|found| found.what.epoch().is_none());
        match unclear.is_empty() {
            true => (
                Outcome::Pass,
                format!(
                    "neither slot-{left} nor root-{left} lies there, by name or by content; what that is worth, erasure says"
                ),
            ),
            false => not_tested(format!("nobody can tell what this is: {unclear}")),
        }
    }

    fn names(&self, is_one: impl Fn(&Found) -> bool) -> String {
        let names = self.found.iter().filter(|found| is_one(found));
        names
            .map(|found| found.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// What a file is, if it is a slot or a root, or could be one.
fn look(home: &Path, path: &Path, is_regular: bool, keystore: Uuid) -> Option<Found> {
    let name = path
        .strip_prefix(home)
        .unwrap_or(path)
        .to_string_lossy()
        .into_owned();
    let last = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let is_named_so = last.starts_with("slot-") || last.starts_with("root-");
    let by_name = is_named_so.then_some(What::Unknown);
    let what = match is_regular.then(|| first_bytes(path)) {
        None => by_name,
        Some(Ok(bytes)) => What::of_bytes(&bytes, keystore).or(by_name),
        Some(Err(error)) if error.kind() == ErrorKind::NotFound => None,
        Some(Err(_)) => Some(What::Unread),
    };
    what.map(|what| Found { name, what })
}

fn first_bytes(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(HEADER_LEN);
    File::open(path)?
        .take(HEADER_LEN as u64)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const ID: Uuid = Uuid::from_bytes([9; 16]);

    /// The present slot and root of a keystore.
    pub(in super::super) fn write_present(home: &Path, epoch: u64) {
        std::fs::write(home.join(format!("slot-{epoch}")), slot(epoch, ID)).unwrap();
        std::fs::write(home.join(format!("root-{epoch}")), root(epoch)).unwrap();
    }

    pub(in super::super) fn slot(epoch: u64, id: Uuid) -> Vec<u8> {
        [
            SLOT_MAGIC.as_slice(),
            &[1, 1],
            id.as_bytes(),
            &epoch.to_be_bytes(),
            &[7; 32],
        ]
        .concat()
    }

    fn root(epoch: u64) -> Vec<u8> {
        [
            ROOT_MAGIC.as_slice(),
            &[1],
            ID.as_bytes(),
            &epoch.to_be_bytes(),
            &[7; 60],
        ]
        .concat()
    }

    /// The home of a keystore that has come to epoch 2, with these files beside what it must have.
    fn judged(more: &[(&str, Vec<u8>)]) -> (Outcome, String) {
        let home = tempfile::tempdir().unwrap();
        write_present(home.path(), 2);
        std::fs::create_dir(home.path().join("db")).unwrap();
        for (name, bytes) in [("lock", Vec::new())].iter().chain(more) {
            std::fs::write(home.path().join(name), bytes).unwrap();
        }
        let read = Home::read(home.path(), &ID.to_string()).unwrap();
        let again = Home::of(&Home::value(Some(&read))).unwrap().unwrap();
        assert_eq!(again, read);
        Home::judge(Some(&read), Some(1), 2)
    }

    #[test]
    fn a_home_without_what_was_left_passes_and_what_is_for_later_does_no_harm() {
        assert_eq!(judged(&[]).0, Outcome::Pass);
        let later = [("slot-3.staged", slot(3, ID)), ("root-3", root(3))];
        assert_eq!(judged(&later).0, Outcome::Pass);
        assert_eq!(judged(&[("other", slot(1, Uuid::nil()))]).0, Outcome::Pass);
    }

    #[test]
    fn what_was_left_is_found_by_its_name_and_by_its_content() {
        for (name, bytes) in [
            ("slot-1", slot(1, ID)),
            ("root-1", root(1)),
            ("slot-1.staged", slot(1, ID)),
            ("slot-1", vec![0; 66]),
            ("slot-1.bak", slot(1, ID)),
            ("db/000017.sst", slot(1, ID)),
            ("slot-3", slot(1, ID)),
            ("kept", root(1)),
        ] {
            let (outcome, detail) = judged(&[(name, bytes)]);
            assert!(
                outcome == Outcome::Fail && detail.contains(name),
                "{name}: {detail}"
            );
        }
    }

    #[test]
    fn what_nobody_can_tell_bars_a_pass() {
        for (name, bytes) in [
            ("slot-1.bak", Vec::new()),
            ("slot-", slot(1, Uuid::nil())),
            ("root-old", vec![0; 93]),
            ("kept", SLOT_MAGIC.to_vec()),
            ("slot-3", vec![0; 66]),
        ] {
            let (outcome, detail) = judged(&[(name, bytes)]);
            assert!(
                outcome == Outcome::NotTested && detail.contains(name),
                "{name}: {detail}"
            );
        }
    }

    #[test]
    fn a_directory_that_is_not_the_home_proves_nothing() {
        let elsewhere = tempfile::tempdir().unwrap();
        std::fs::write(elsewhere.path().join("audit.log"), "copied").unwrap();
        let judge = || {
            Home::judge(
                Some(&Home::read(elsewhere.path(), &ID.to_string()).unwrap()),
                Some(1),
                2,
            )
        };
        let (outcome, detail) = judge();
        assert!(
            outcome == Outcome::NotTested && detail.contains("no slot-2"),
            "{detail}"
        );
        // Nor is it enough that a file has the name.
        std::fs::write(elsewhere.path().join("slot-2"), slot(2, Uuid::nil())).unwrap();
        std::fs::write(elsewhere.path().join("root-2"), root(2)).unwrap();
        assert_eq!(judge().0, Outcome::NotTested);
        std::fs::write(elsewhere.path().join("slot-2"), slot(2, ID)).unwrap();
        assert_eq!(judge().0, Outcome::Pass);
        std::fs::remove_file(elsewhere.path().join("slot-2")).unwrap();
        std::os::unix::fs::symlink("elsewhere", elsewhere.path().join("slot-2")).unwrap();
        assert_eq!(judge().0, Outcome::NotTested);
        assert_eq!(Home::judge(None, Some(1), 2).0, Outcome::NotTested);
        let read = Home::read(elsewhere.path(), &ID.to_string()).unwrap();
        assert_eq!(Home::judge(Some(&read), None, 2).0, Outcome::NotTested);
        assert!(Home::read(&elsewhere.path().join("nowhere"), &ID.to_string()).is_err());
    }
}
