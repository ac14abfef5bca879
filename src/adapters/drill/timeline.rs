//! What an observer logged, and what follows from it: whether any access that began after the call had returned succeeded.

use super::markers::Kind;
use std::collections::BTreeMap;

/// In place of an errno: an access that succeeded and gave other bytes than were written.
pub const DIFFERENT: i32 = -1;
/// First line of a log.
const HEADER: &str = "access,begin_ns,end_ns,errno";

/// A way to get at what is protected, or to change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// open(2), pread(2), close(2) of the small file.
    Small,
    /// pread(2) of the large file through a handle that stays open.
    Large,
    /// The same of the sparse file.
    Sparse,
    /// The same through the handle that a file was written through.
    Open,
    /// A page of a shared mapping.
    MappedShared,
    /// A page of a private mapping.
    MappedPrivate,
    /// Listing the directory.
    List,
    /// stat(2).
    Stat,
    /// readlink(2).
    Link,
    /// getxattr(2).
    Attribute,
    /// pwrite(2), of the bytes that are there.
    Write,
}

impl Access {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Small,
        Self::Large,
        Self::Sparse,
        Self::Open,
        Self::MappedShared,
        Self::MappedPrivate,
        Self::List,
        Self::Stat,
        Self::Link,
        Self::Attribute,
        Self::Write,
    ];

    /// Its name in logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Large => "large",
            Self::Sparse => "sparse",
            Self::Open => "open",
            Self::MappedShared => "mapped-shared",
            Self::MappedPrivate => "mapped-private",
            Self::List => "list",
            Self::Stat => "stat",
            Self::Link => "link",
            Self::Attribute => "attribute",
            Self::Write => "write",
        }
    }

    /// What it is, for a person.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Small => "open and read a small file",
            Self::Large => "read a large file, open before",
            Self::Sparse => "read a sparse file, open before",
            Self::Open => "read through the writing handle",
            Self::MappedShared => "shared mapping",
            Self::MappedPrivate => "private mapping",
            Self::List => "list the directory",
            Self::Stat => "size and times of a file",
            Self::Link => "read a symbolic link",
            Self::Attribute => "read an attribute",
            Self::Write => "write through an open handle",
        }
    }

    /// The file that it goes to.
    #[must_use]
    pub const fn file(self) -> Kind {
        match self {
            Self::Small | Self::Attribute => Kind::Small,
            Self::Large | Self::List | Self::Stat | Self::Link => Kind::Large,
            Self::Sparse => Kind::Sparse,
            Self::Open | Self::Write => Kind::Open,
            Self::MappedShared | Self::MappedPrivate => Kind::Mapped,
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|access| access.name() == name)
    }
}

/// One access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// What was done.
    pub access: Access,
    /// CLOCK_BOOTTIME before it.
    pub begin_ns: u64,
    /// CLOCK_BOOTTIME after it.
    pub end_ns: u64,
    /// 0: it succeeded; [`DIFFERENT`]: with other bytes than were written.
    pub errno: i32,
}

impl Record {
    /// As a line of a log.
    #[must_use]
    pub fn line(&self) -> String {
        format!(
            "{},{},{},{}",
            self.access.name(),
            self.begin_ns,
            self.end_ns,
            self.errno
        )
    }

    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(',');
        let record = Self {
            access: Access::parse(fields.next()?)?,
            begin_ns: fields.next()?.parse().ok()?,
            end_ns: fields.next()?.parse().ok()?,
            errno: fields.next()?.parse().ok()?,
        };
        (fields.next().is_none() && record.begin_ns <= record.end_ns).then_some(record)
    }

    /// Whether something came, right or wrong.
    #[must_use]
    pub const fn succeeded(&self) -> bool {
        self.errno <= 0
    }
}

/// The text of a log.
#[must_use]
pub fn text(lines: &[String]) -> String {
    let mut text = HEADER.to_owned();
    for line in lines {
        text.push('\n');
        text.push_str(line);
    }
    text.push('\n');
    text
}

/// The records of a log.
///
/// # Errors
/// The first line that is none.
pub fn parse(text: &str) -> Result<Vec<Record>, String> {
    let mut lines = text.lines();
    if lines.next() != Some(HEADER) {
        return Err("a log of accesses does not begin as one".to_owned());
    }
    lines
        .map(|line| Record::parse(line).ok_or_else(|| format!("'{line}' is no record of an access")))
        .collect()
}

/// When a key was taken away, and given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Darkness {
    /// The call that takes it away was made.
    pub called_ns: u64,
    /// It had returned.
    pub returned_ns: u64,
    /// The call that gives it back was made, or the observation ended.
    pub until_ns: u64,
}

/// What a log says of one darkness.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Accesses that succeeded and began before the call, by name.
    pub before: BTreeMap<&'static str, u64>,
    /// Accesses that began after the call had returned and before the key was given back, by name.
    pub after: BTreeMap<&'static str, u64>,
    /// Of those, how many succeeded. It must be 0.
    pub successes_after: u64,
    /// The first of them.
    pub first_success_after: Option<Record>,
    /// The last success of all that began before the call returned, in nanoseconds before that (negative: it ended later).
    pub last_success_begin_ns: Option<u64>,
    /// Accesses that gave other bytes than were written.
    pub different: u64,
    /// How often each errno was seen after the return.
    pub errnos: BTreeMap<i32, u64>,
}

impl Verdict {
    /// Judges a log.
    #[must_use]
    pub fn of(records: &[Record], darkness: Darkness) -> Self {
        let mut verdict = Self::default();
        for record in records {
            verdict.different += u64::from(record.errno == DIFFERENT);
            if record.begin_ns < darkness.called_ns && record.succeeded() {
                *verdict.before.entry(record.access.name()).or_default() += 1;
            }
            if record.begin_ns <= darkness.returned_ns {
                if record.succeeded() {
                    verdict.last_success_begin_ns = verdict.last_success_begin_ns.max(Some(record.begin_ns));
                }
                continue;
            }
            if record.begin_ns >= darkness.until_ns {
                continue;
            }
            // An access that the key's return overtook may succeed: it ends after that.
            *verdict.after.entry(record.access.name()).or_default() += 1;
            if !record.succeeded() {
                *verdict.errnos.entry(record.errno).or_default() += 1;
            } else if record.end_ns < darkness.until_ns {
                verdict.successes_after += 1;
                verdict.first_success_after.get_or_insert(*record);
            }
        }
        verdict
    }

    /// The kinds of access that were not made both before the call and after its return: of those nothing is known.
    #[must_use]
    pub fn unobserved(&self) -> Vec<&'static str> {
        let seen = |access: &Access| {
            let name = access.name();
            self.before.contains_key(name) && self.after.contains_key(name)
        };
        Access::ALL
            .iter()
            .filter(|access| !seen(access))
            .map(|access| access.name())
            .collect()
    }

    /// Whether the promise was kept, and was put to the test.
    ///
    /// # Errors
    /// What did not hold.
    pub fn held(&self) -> Result<(), String> {
        if let Some(record) = self.first_success_after {
            return Err(format!(
                "{} accesses that began after the call had returned succeeded; the first: {}",
                self.successes_after,
                record.line()
            ));
        }
        if self.different > 0 {
            return Err(format!(
                "{} accesses gave other bytes than were written",
                self.different
            ));
        }
        match self.unobserved() {
            none if none.is_empty() => Ok(()),
            some => Err(format!(
                "not both seen to succeed before and tried after: {}",
                some.join(", ")
            )),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) const DARK: Darkness = Darkness {
        called_ns: 1000,
        returned_ns: 2000,
        until_ns: 9000,
    };

    /// A log in which every access succeeds before the call, and is refused after its return.
    pub(crate) fn good() -> Vec<Record> {
        let each = |access| {
            [
                (500, 0),
                (1500, 0),
                (2500, libc::EKEYREVOKED),
                (8000, libc::EFAULT),
                (9500, 0),
            ]
            .map(|(begin_ns, errno)| Record {
                access,
                begin_ns,
                end_ns: begin_ns + 10,
                errno,
            })
        };
        Access::ALL.into_iter().flat_map(each).collect()
    }

    #[test]
    fn a_log_that_held_is_read_back_and_holds() {
        let lines: Vec<_> = good().iter().map(Record::line).collect();
        let records = parse(&text(&lines)).unwrap();
        assert_eq!(records, good());
        let verdict = Verdict::of(&records, DARK);
        verdict.held().unwrap();
        assert_eq!(verdict.last_success_begin_ns, Some(1500));
        assert_eq!(verdict.errnos[&libc::EKEYREVOKED], 11);
    }

    #[test]
    fn a_success_that_began_after_the_return_fails() {
        for access in Access::ALL {
            let mut records = good();
            records.push(Record {
                access,
                begin_ns: 2001,
                end_ns: 2002,
                errno: 0,
            });
            let verdict = Verdict::of(&records, DARK);
            assert_eq!(verdict.successes_after, 1);
            assert!(verdict.held().unwrap_err().contains(access.name()));
        }
    }

    #[test]
    fn an_access_that_began_before_the_return_or_ended_after_the_key_was_back_counts_as_neither() {
        let mut records = good();
        for (begin_ns, end_ns) in [(2000, 2500), (8999, 9000)] {
            records.push(Record {
                access: Access::Large,
                begin_ns,
                end_ns,
                errno: 0,
            });
        }
        Verdict::of(&records, DARK).held().unwrap();
    }

    #[test]
    fn other_bytes_and_kinds_that_were_not_tried_fail() {
        let mut records = good();
        if let Some(record) = records.first_mut() {
            record.errno = DIFFERENT;
        }
        assert!(Verdict::of(&records, DARK).held().is_err());
        let mut records = good();
        records.retain(|record| record.access != Access::Link || record.begin_ns < 2000);
        assert_eq!(Verdict::of(&records, DARK).unobserved(), ["link"]);
        assert!(Verdict::of(&records, DARK).held().is_err());
    }

    #[test]
    fn lines_that_are_no_records_are_refused() {
        for bad in [
            "",
            "large,1,2",
            "large,2,1,0",
            "huge,1,2,0",
            "large,1,2,0,5",
            "large,1,2,x",
        ] {
            assert!(parse(&format!("{HEADER}\n{bad}\n")).is_err(), "{bad}");
        }
        assert!(parse("large,1,2,0\n").is_err());
    }
}
