//! What is done on a volume while its storage fails: every operation, on files that are inline and on files in slots.

use crate::oracle::Op::{self, *};

const KIB: usize = 1 << 10;

const fn write(path: &'static str, offset: usize, length: usize) -> Op {
    Op::Write { path, offset, length }
}

/// What the volume holds before anything fails. It is closed several times, so that RocksDB has table files to compact.
pub const PREPARATION: &[Op] = &[
    Mkdir("d"),
    Create("big"),
    write("big", 0, 300 * KIB),
    Create("log"),
    write("log", 0, 20 * KIB),
    Reopen,
    Create("d/mid"),
    write("d/mid", 0, 60 * KIB),
    SetXattr("big", "user.one", 100),
    Reopen,
    Create("victim"),
    write("victim", 0, 200 * KIB),
    write("log", 20 * KIB, 5000),
    Reopen,
    Create("left"),
    write("left", 0, 40 * KIB),
    Fsync("left"),
];

pub const WORKLOAD: &[Op] = &[
    Create("new"),
    write("new", 0, 5000),
    Fsync("new"),
    // A small overwrite goes inline, and to its slot later.
    write("big", 12_388, 6000),
    Fsync("big"),
    Wait,
    // A whole chunk goes to a fresh run; what comes next, to one that was freed.
    write("big", 0, 128 * KIB),
    write("big", 256 * KIB, 200 * KIB),
    Fsync("big"),
    Wait,
    write("big", 100, 50),
    // As editors replace files, with a sync and without.
    Create("tmp"),
    write("tmp", 0, 150 * KIB),
    Fsync("tmp"),
    Rename("tmp", "d/mid"),
    Create("tmp"),
    write("tmp", 0, 40_000),
    Rename("tmp", "log"),
    Fsync(""),
    Link("big", "d/link"),
    SetXattr("new", "user.two", 3000),
    RemoveXattr("big", "user.one"),
    Mkdir("e"),
    Create("e/x"),
    write("e/x", 0, 70_000),
    Fsync("e"),
    Unlink("e/x"),
    Rmdir("e"),
    Truncate("big", 100_001),
    Truncate("big", 180_000),
    Fsync("big"),
    Punch("big", 8192, 70_000),
    write("big", 20_000, 4096),
    ZeroRange("d/mid", 1000, 9000),
    Fsync("d/mid"),
    Allocate("new", 0, 300 * KIB),
    write("new", 140_000, 9000),
    Fsync("new"),
    Wait,
    Exchange("log", "d/link"),
    Unlink("victim"),
    Wait,
    write("left", 0, 4096),
    Reopen,
    write("left", 8192, 30_000),
    write("big", 300 * KIB, 100),
    Create("d/late"),
    write("d/late", 0, 33 * KIB),
    Fsync("d/late"),
    Wait,
    Unlink("d/mid"),
    Rename("new", "d/new"),
    Truncate("left", 0),
    Fsync("left"),
    Wait,
    write("left", 0, 10),
];

/// What must succeed once nothing fails any more.
pub const PROBE: &[Op] = &[
    Create("probe"),
    write("probe", 0, 100 * KIB),
    Fsync("probe"),
    Unlink("probe"),
    Fsync(""),
];
