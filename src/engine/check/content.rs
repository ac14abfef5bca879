//! Chunk records, bitmap records and inline blocks: what a file's content consists of, all of it and nothing else.

use super::repair::{Fix, Recount};
use super::{Check, Fault};
use crate::engine::core::Core;
use crate::engine::error::{Error, Result};
use crate::engine::format::chunk::{BLOCK, Block, CHUNK_BLOCKS, Chunk};
use crate::engine::format::rowkey::{self, Family, Kind};
use crate::engine::runs::{PAGE_BYTES, PAGE_RUNS, RunSet};
use crate::engine::slots::SlotFile;
use crate::engine::store::{Row, Rows};
use crate::engine::types::{Domain, FileKind, Ino};
use std::collections::{BTreeMap, BTreeSet};
use std::iter::Peekable;

/// The ciphertext of every inline block of the volume, in the order of their chunks.
struct Bodies<'s> {
    rows: Peekable<Rows<'s>>,
    /// The domains whose bodies are looked at.
    reached: Vec<Domain>,
}

impl<'s> Bodies<'s> {
    fn new(core: &'s Core, reached: Vec<Domain>) -> Self {
        let (from, _) = rowkey::all_content(Domain::FIRST);
        let (_, to) = rowkey::all_content(reached.last().copied().unwrap_or_default());
        let rows = core.store.rows(Family::Content, &from, &to).peekable();
        Self { rows, reached }
    }

    /// The next row's key and length, if it comes before `end`.
    fn before(&mut self, end: Option<&[u8]>) -> Result<Option<(Box<[u8]>, usize)>> {
        let is_before = |row: &Result<Row>| match (row, end) {
            (Ok((key, _)), Some(end)) => **key < *end,
            _ => true,
        };
        while let Some((key, body)) = self.rows.next_if(is_before).transpose()? {
            if rowkey::domain_of(&key).is_some_and(|domain| self.reached.contains(&domain)) {
                return Ok(Some((key, body.len())));
            }
        }
        Ok(None)
    }
}

/// What the chunk records of one file add up to. They come one after the other.
#[derive(Default)]
pub(super) struct FileContent {
    ino: Ino,
    blocks: u64,
    runs: u64,
    used: RunSet,
    is_damaged: bool,
    /// Bytes that the slot file must have.
    slots_end: u64,
}

impl Check<'_> {
    pub(super) fn check_content(&mut self) -> Result<()> {
        let mut file = FileContent::default();
        let mut bodies = Bodies::new(self.core, self.access.reached());
        let bodies = &mut bodies;
        self.each_row(Kind::Chunk, "chunks", None, |check, key, sealed| {
            let (ino, index) = rowkey::numbers(key);
            if ino != file.ino {
                check.end_file(&std::mem::take(&mut file))?;
                file.ino = ino;
            }
            if !check.is_known(ino) {
                let fix = Fix::DeleteRow(Family::Meta, key.to_vec());
                check.found(
                    Fault::LeftOver,
                    Some(ino),
                    "a chunk of no inode".to_owned(),
                    Some(fix),
                );
                return check.check_bodies(bodies, ino, index, Some(&Chunk::default()));
            }
            match check.access.open_chunk(ino, key, sealed) {
                Ok(chunk) => check.check_chunk(bodies, &mut file, index, &chunk),
                Err(_) => {
                    file.is_damaged = true;
                    let detail = format!("the record of chunk {index} fails authentication");
                    check.found(Fault::Record, Some(ino), detail, None);
                    check.check_bodies(bodies, ino, index, None)
                }
            }
        })?;
        if self.is_incomplete {
            return Ok(());
        }
        self.end_file(&file)?;
        let left_over = self.left_over_bodies(bodies, None);
        self.tolerate("inline blocks", left_over)?;
        self.check_files_without_chunks();
        self.check_stray_bitmaps()
    }

    fn check_chunk(
        &mut self,
        bodies: &mut Bodies<'_>,
        file: &mut FileContent,
        index: u64,
        chunk: &Chunk,
    ) -> Result<()> {
        let ino = file.ino;
        file.blocks = file.blocks.saturating_add(chunk.allocated());
        if let Some(run) = chunk.run {
            file.runs += 1;
            if !file.used.insert(run) {
                let detail = format!("chunk {index} and another name run {run}");
                self.found(Fault::SharedRun, Some(ino), detail, None);
            }
            let slots = (0..CHUNK_BLOCKS)
                .rev()
                .find(|at| matches!(chunk.block(*at), Block::Slot(_)));
            if let Some(last) = slots {
                let end = run
                    .saturating_mul(CHUNK_BLOCKS as u64)
                    .saturating_add(last as u64 + 1);
                file.slots_end = file.slots_end.max(end.saturating_mul(BLOCK as u64));
            }
        }
        self.check_bodies(bodies, file.ino, index, Some(chunk))
    }

    /// Compares the inline blocks of a chunk with the ciphertext that is there; `None` for a chunk whose record is damaged.
    fn check_bodies(
        &mut self,
        bodies: &mut Bodies<'_>,
        ino: Ino,
        index: u64,
        chunk: Option<&Chunk>,
    ) -> Result<()> {
        let first = index.saturating_mul(CHUNK_BLOCKS as u64);
        let start = rowkey::content(ino, first);
        let end = rowkey::content(ino, first.saturating_add(CHUNK_BLOCKS as u64));
        self.left_over_bodies(bodies, Some(&start))?;
        let mut lengths = [None; CHUNK_BLOCKS];
        while let Some((key, length)) = bodies.before(Some(&end))? {
            let (_, number) = rowkey::numbers(&key);
            if let Some(place) = lengths.get_mut((number % CHUNK_BLOCKS as u64) as usize) {
                *place = Some(length);
            }
        }
        let Some(chunk) = chunk else { return Ok(()) };
        for ((block, found), number) in chunk.blocks.iter().zip(lengths).zip(first..) {
            match (block, found) {
                (Block::Inline { length, .. }, found) if found != Some(usize::from(*length)) => {
                    let detail = format!("the ciphertext of block {number} is not there");
                    self.found(Fault::Missing, Some(ino), detail, None);
                }
                (Block::Inline { .. }, _) | (_, None) => {}
                (_, Some(_)) => self.left_over_body(ino, number, "which is not inline"),
            }
        }
        Ok(())
    }

    /// Ciphertext of blocks whose chunk has no record.
    fn left_over_bodies(&mut self, bodies: &mut Bodies<'_>, end: Option<&[u8]>) -> Result<()> {
        while let Some((key, _)) = bodies.before(end)? {
            self.access.go_on()?;
            let (ino, number) = rowkey::numbers(&key);
            if !self.damaged.contains(&ino) {
                self.left_over_body(ino, number, "which is a hole");
            }
        }
        Ok(())
    }

    fn left_over_body(&mut self, ino: Ino, number: u64, why: &str) {
        let fix = Fix::DeleteRow(Family::Content, rowkey::content(ino, number));
        let detail = format!("ciphertext of block {number}, {why}");
        self.found(Fault::LeftOver, Some(ino), detail, Some(fix));
    }

    /// Compares a file's counts and bitmaps with what its chunk records say.
    fn end_file(&mut self, file: &FileContent) -> Result<()> {
        let ino = file.ino;
        let Some(known) = self.inodes.get_mut(&ino) else {
            return Ok(());
        };
        known.found.is_content_damaged = file.is_damaged;
        known.found.has_chunks = true;
        if file.is_damaged {
            return Ok(());
        }
        let (blocks, runs) = (known.blocks, known.runs);
        known.found.has_runs = file.runs > 0;
        if known.kind != Some(FileKind::Regular) {
            self.found(
                Fault::Record,
                Some(ino),
                "content of what is no file".to_owned(),
                None,
            );
            return Ok(());
        }
        if (blocks, runs) != (file.blocks, file.runs) {
            let recount = Recount {
                content: Some((file.blocks, file.runs)),
                ..Recount::default()
            };
            let detail = format!(
                "blocks: {blocks}, should be {}; runs: {runs}, should be {}",
                file.blocks, file.runs
            );
            self.found(Fault::Count, Some(ino), detail, Some(Fix::Counts(ino, recount)));
        }
        self.check_bitmaps(file)?;
        if file.runs > 0 {
            self.check_slots(file)?;
        }
        Ok(())
    }

    fn check_bitmaps(&mut self, file: &FileContent) -> Result<()> {
        let ino = file.ino;
        let (from, to) = (rowkey::bitmap(ino, 0), rowkey::bitmap(ino, u64::MAX));
        let mut pages = BTreeMap::new();
        let access = &self.access;
        self.core.store.scan(Family::Meta, &from, &to, |key, sealed| {
            let page = rowkey::last_number(key).unwrap_or_default();
            pages.insert(page, access.open_row(ino, key, sealed).ok());
            Ok(true)
        })?;
        let wanted = file.used.records();
        let numbers: BTreeSet<u64> = pages.keys().chain(wanted.keys()).copied().collect();
        let nothing = vec![0; PAGE_BYTES];
        for page in numbers {
            let is = pages.get(&page).cloned().unwrap_or_else(|| Some(nothing.clone()));
            let should = wanted.get(&page).unwrap_or(&nothing);
            if is.as_ref() != Some(should) {
                let detail = format!("the bitmap of runs from {} on", page.saturating_mul(PAGE_RUNS));
                let fix = Fix::Bitmap(ino, page, should.clone());
                self.found(Fault::Bitmap, Some(ino), detail, Some(fix));
            }
        }
        Ok(())
    }

    /// The slot file is there, holds every slot, and holds nothing else.
    fn check_slots(&mut self, file: &FileContent) -> Result<()> {
        let ino = file.ino;
        let slots = match self.core.slots.existing(ino) {
            Ok(slots) => slots,
            Err(Error::Corrupt { .. }) => {
                self.found(
                    Fault::Missing,
                    Some(ino),
                    "its slot file is not there".to_owned(),
                    None,
                );
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let length = slots.length()?;
        if length < file.slots_end {
            let detail = format!("its slot file ends at {length}, content at {}", file.slots_end);
            self.found(Fault::Missing, Some(ino), detail, None);
        }
        let leaked = leaked_runs(&slots, &file.used)?;
        if !leaked.is_empty() {
            let detail = format!("{} runs of its slot file hold what nothing names", leaked.len());
            self.found(
                Fault::LeakedSpace,
                Some(ino),
                detail,
                Some(Fix::Punch(ino, leaked)),
            );
        }
        Ok(())
    }

    fn check_files_without_chunks(&mut self) {
        let counted = |known: &super::Known| known.blocks > 0 || known.runs > 0;
        let mut empty: Vec<_> = self
            .inodes
            .iter()
            .filter(|(_, known)| !known.found.has_chunks && counted(known))
            .map(|(ino, _)| *ino)
            .collect();
        empty.sort_unstable();
        for ino in empty {
            let detail = "it counts blocks, and has none".to_owned();
            let recount = Recount {
                content: Some((0, 0)),
                ..Recount::default()
            };
            self.found(Fault::Count, Some(ino), detail, Some(Fix::Counts(ino, recount)));
        }
    }

    /// Bitmaps of inodes that have no chunks.
    fn check_stray_bitmaps(&mut self) -> Result<()> {
        self.each_row(Kind::Bitmap, "bitmaps", None, |check, key, sealed| {
            let (ino, _) = rowkey::numbers(key);
            let is_checked = check.damaged.contains(&ino)
                || check.inodes.get(&ino).is_some_and(|known| known.found.has_chunks);
            if is_checked {
                return Ok(());
            }
            let plain = check.access.open_row(ino, key, sealed);
            if check.is_known(ino) && plain.is_ok_and(|plain| plain.iter().all(|byte| *byte == 0)) {
                return Ok(());
            }
            let fix = Fix::DeleteRow(Family::Meta, key.to_vec());
            check.found(
                Fault::LeftOver,
                Some(ino),
                "a bitmap of no runs".to_owned(),
                Some(fix),
            );
            Ok(())
        })
    }
}

/// Runs in which the host's file has data, and which are not in use.
fn leaked_runs(slots: &SlotFile, used: &RunSet) -> Result<Vec<u64>> {
    let mut leaked = Vec::new();
    let mut run = 0;
    while let Some(next) = slots.next_run_with_data(run)? {
        if !used.contains(next) {
            leaked.push(next);
        }
        run = next.saturating_add(1);
    }
    Ok(leaked)
}
