//! What a check says.

use crate::engine::domain::DomainStatus;
use crate::engine::types::Ino;

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// A record fails authentication, or cannot be what was written.
    Record,
    /// A name leads to an inode that is not there, or to one of another kind, or cannot be found by looking it up.
    Name,
    /// An inode has no name.
    Lost,
    /// Directories that no path leads to.
    Unreachable,
    /// A count in an inode's record is not what there is: links, entries, attributes, blocks, runs.
    Count,
    /// The volume's counters are not what there is.
    Counter,
    /// A bitmap record does not name the runs that chunk records name.
    Bitmap,
    /// Two chunks name one run.
    SharedRun,
    /// The ciphertext of a block is not there.
    Missing,
    /// A row belongs to nothing.
    LeftOver,
    /// Space in slot files that nothing uses.
    LeakedSpace,
    /// A file in the volume that is none of its own.
    Foreign,
    /// A block's content fails authentication.
    Block,
    /// The records of an inode, or of a domain, are not those that were last written: some were put back as they once were,
    /// dropped or added.
    Root,
}

impl Fault {
    /// A short name, for programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Record => "record",
            Self::Name => "name",
            Self::Lost => "lost",
            Self::Unreachable => "unreachable",
            Self::Count => "count",
            Self::Counter => "counter",
            Self::Bitmap => "bitmap",
            Self::SharedRun => "shared-run",
            Self::Missing => "missing",
            Self::LeftOver => "left-over",
            Self::LeakedSpace => "leaked-space",
            Self::Foreign => "foreign",
            Self::Block => "block",
            Self::Root => "root",
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What it is.
    pub fault: Fault,
    /// The inode it concerns.
    pub ino: Option<Ino>,
    /// A path of that inode, from the volume's root, if it has one. Any bytes but NUL.
    pub path: Option<Vec<u8>>,
    /// More of it, for a person; without names or content.
    pub detail: String,
    /// Whether it was repaired.
    pub is_repaired: bool,
}

/// What there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Inodes, of which are directories, and regular files.
    pub inodes: u64,
    /// Directories.
    pub directories: u64,
    /// Regular files.
    pub files: u64,
    /// Blocks of 4 KiB that are not holes.
    pub blocks: u64,
    /// Inodes without names that the next mount removes.
    pub orphans: u64,
    /// Blocks that were read and opened.
    pub scrubbed_blocks: u64,
}

/// The outcome of a check.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// What there is.
    pub counts: Counts,
    /// What is wrong with it, in the order in which it was found.
    pub problems: Vec<Problem>,
    /// The volume's key domains, its own first.
    pub domains: Vec<CheckedDomain>,
}

/// A key domain, in a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedDomain {
    /// What it is. If it is erased its content is noise, and not to be checked by anybody.
    pub status: DomainStatus,
    /// Whether its keys could be used, so that it was looked at.
    pub is_checked: bool,
}

impl Report {
    /// Problems that were repaired, and others.
    #[must_use]
    pub fn totals(&self) -> (usize, usize) {
        let repaired = self.problems.iter().filter(|problem| problem.is_repaired).count();
        (repaired, self.problems.len() - repaired)
    }
}

/// What a check tells while it goes on.
#[derive(Debug, Clone, Copy)]
pub enum Event<'e> {
    /// How far it got.
    Progress {
        /// What is being looked at.
        phase: &'static str,
        /// How many of them were.
        done: u64,
        /// How many there are, where that is known.
        total: Option<u64>,
    },
    /// A problem.
    Found(&'e Problem),
    /// A problem that was repaired.
    Repaired(&'e Problem),
}
