//! From the material of a customer master key to names and content (docs/format.md).

use crate::crypto::{Key, NONCE, TAG, derive, open};
use crate::keystore::{Opened, wrapping_key};
use crate::read::{Database, Row, walk};
use secret_search::Form;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Formats that are known. The second adds sums behind what is read here.
const VERSIONS: [u32; 2] = [1, 2];
const BLOCK: usize = 4096;
const CHUNK_BLOCKS: usize = 32;
const ROOT_INODE: u64 = 1;
const DOMAIN: [u8; 2] = [0, 0];

/// A volume's copy.
pub(crate) struct Volume {
    dir: PathBuf,
    superblock: Option<Superblock>,
    pub(crate) files: u64,
    pub(crate) bytes: u64,
}

struct Superblock {
    id: [u8; 16],
    wrapped: Vec<u8>,
    /// SHA-256 of everything before the wrapped key.
    hash: [u8; 32],
}

/// A file that was recovered.
#[derive(Debug)]
pub struct File {
    /// Below the volume's root, as far as names could be opened.
    pub path: String,
    /// In bytes.
    pub size: u64,
    /// Of its content; `None` if a block did not open.
    pub sha256: Option<String>,
}

/// What came of one copy of a volume.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Where it lies.
    pub dir: PathBuf,
    /// Whether it has a superblock, and a database that can be read.
    pub is_whole: bool,
    /// Sealed records that there are.
    pub records: u64,
    /// Whether its volume key was opened.
    pub has_key: bool,
    /// Records that were opened.
    pub opened_records: u64,
    /// Data keys that were opened.
    pub data_keys: u64,
    /// Files with their content.
    pub files: Vec<File>,
}

impl Volume {
    pub(crate) fn read(dir: &Path) -> Result<Self, String> {
        let paths = walk(dir)?;
        let sizes = paths.iter().filter_map(|path| path.metadata().ok());
        Ok(Self {
            dir: dir.to_owned(),
            superblock: std::fs::read(dir.join("superblock"))
                .ok()
                .and_then(|bytes| Superblock::parse(&bytes)),
            files: paths.len() as u64,
            bytes: sizes.map(|file| file.len()).sum(),
        })
    }

    /// The key and the version that its superblock names.
    pub(crate) fn wrapping_key(&self) -> Option<([u8; 16], [u8; 16])> {
        wrapping_key(&self.superblock.as_ref()?.wrapped)
    }

    pub(crate) fn recover(&self, opened: &mut Opened, forms: &mut Vec<Form>) -> Recovered {
        let mut recovered = Recovered {
            dir: self.dir.clone(),
            ..Recovered::default()
        };
        let database = Database::open(&self.dir.join("meta"));
        let (Some(superblock), Some(database)) = (&self.superblock, database) else {
            return recovered;
        };
        recovered.is_whole = true;
        let rows = database.rows("meta");
        recovered.records = rows.len() as u64;
        let context = [
            ("purpose", "vk".to_owned()),
            ("volume", hex::encode(superblock.id)),
            ("domain", "0".to_owned()),
            ("superblock", hex::encode(superblock.hash)),
        ];
        let volume_key = opened.unwrap_key(&superblock.wrapped, &context);
        let Some(volume_key) = volume_key else {
            return recovered;
        };
        recovered.has_key = true;
        crate::add_forms(forms, "volume key", &volume_key);
        let names = derive(&volume_key, &superblock.id, "cmkfs/1/names/0000");
        crate::add_forms(forms, "name key", &names);
        let records = derive(&volume_key, &superblock.id, "cmkfs/1/records/0000");
        crate::add_forms(forms, "record key", &records);
        let tree = Tree::open(superblock, &records, &rows, &mut recovered);
        for (inode, node) in &tree.nodes {
            if node.kind != 1 {
                continue;
            }
            let context = [
                ("purpose", "dek".to_owned()),
                ("volume", hex::encode(superblock.id)),
                ("domain", "0".to_owned()),
                ("inode", inode.to_string()),
            ];
            let Some(dek) = opened.unwrap_key(&node.wrapped, &context) else {
                continue;
            };
            recovered.data_keys += 1;
            crate::add_forms(forms, &format!("data key {inode}"), &dek);
            let content = derive(&dek, &superblock.id, "cmkfs/1/content/0000");
            crate::add_forms(forms, &format!("file key {inode}"), &content);
            let sha256 = self.content(superblock, &database, &tree, (*inode, node.size), &content);
            recovered.files.push(File {
                path: tree.path(*inode),
                size: node.size,
                sha256,
            });
        }
        recovered
    }

    /// SHA-256 of a file's content.
    fn content(
        &self,
        superblock: &Superblock,
        database: &Database,
        tree: &Tree,
        (inode, size): (u64, u64),
        key: &Key,
    ) -> Option<String> {
        let name = format!("{:02X}/{inode:016X}", inode % 256);
        let slots = std::fs::File::open(self.dir.join("data").join(&name))
            .or_else(|_| std::fs::File::open(self.dir.join("data").join(name.to_lowercase())));
        let mut hash = Sha256::new();
        for index in 0..size.div_ceil(BLOCK as u64) {
            let mut plain = vec![0; BLOCK];
            let chunk = tree.chunks.get(&(inode, index / CHUNK_BLOCKS as u64));
            let place = usize::try_from(index % CHUNK_BLOCKS as u64).ok()?;
            match chunk.and_then(|chunk| chunk.blocks.get(place).map(|block| (chunk.run, block))) {
                None | Some((_, Block::Hole)) => {}
                Some((
                    run,
                    Block::Sealed {
                        length,
                        nonce,
                        tag,
                        is_inline,
                    },
                )) => {
                    let text = if *is_inline {
                        let row = [&DOMAIN[..], &inode.to_be_bytes(), &index.to_be_bytes()].concat();
                        database.get("content", &row)?
                    } else {
                        let at = run
                            .checked_mul(131_072)?
                            .checked_add(place as u64 * BLOCK as u64)?;
                        let mut text = vec![0; BLOCK];
                        slots.as_ref().ok()?.read_exact_at(&mut text, at).ok()?;
                        text
                    };
                    let aad = [
                        b"cmkfs\x01b\x01".as_slice(),
                        &superblock.id,
                        &DOMAIN,
                        &inode.to_be_bytes(),
                        &index.to_be_bytes(),
                        &length.to_be_bytes(),
                    ]
                    .concat();
                    let opened = open(key, nonce, &aad, &text, tag)?;
                    for (out, byte) in plain.iter_mut().zip(opened.iter()) {
                        *out = *byte;
                    }
                }
            }
            let left = usize::try_from(size - index * BLOCK as u64).unwrap_or(BLOCK);
            hash.update(plain.get(..left.min(BLOCK))?);
        }
        Some(hex::encode(hash.finalize()))
    }
}

impl Superblock {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut input = Input(bytes);
        if input.take(8)? != b"cmkfsvol" || !VERSIONS.contains(&input.u32()?) {
            return None;
        }
        let id = input.take(16)?.try_into().ok()?;
        input.field()?;
        let fixed = bytes.get(..bytes.len() - input.0.len())?;
        Some(Self {
            id,
            hash: Sha256::digest(fixed).into(),
            wrapped: input.field()?.to_vec(),
        })
    }
}

/// Bytes that are still to be read.
struct Input<'b>(&'b [u8]);

impl<'b> Input<'b> {
    fn take(&mut self, length: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }

    fn field(&mut self) -> Option<&'b [u8]> {
        let length = usize::from(self.u16()?);
        self.take(length)
    }
}

struct Node {
    kind: u8,
    size: u64,
    wrapped: Vec<u8>,
}

enum Block {
    Hole,
    Sealed {
        length: u16,
        nonce: [u8; NONCE],
        tag: [u8; TAG],
        is_inline: bool,
    },
}

struct Chunk {
    run: u64,
    blocks: Vec<Block>,
}

/// Every record that opened.
#[derive(Default)]
struct Tree {
    nodes: BTreeMap<u64, Node>,
    /// A child's directory and name there.
    names: BTreeMap<u64, (u64, String)>,
    chunks: BTreeMap<(u64, u64), Chunk>,
}

impl Tree {
    fn open(superblock: &Superblock, records: &Key, rows: &[Row], recovered: &mut Recovered) -> Self {
        let mut tree = Self::default();
        for (row_key, value) in rows {
            let plain = (|| {
                let (nonce, rest) = value.split_at_checked(NONCE)?;
                let (tag, text) = rest.split_at_checked(TAG)?;
                let aad = [
                    b"cmkfs\x01r\x01".as_slice(),
                    &superblock.id,
                    &DOMAIN,
                    &[1],
                    row_key,
                ]
                .concat();
                open(records, nonce, &aad, text, tag)
            })();
            let Some(plain) = plain else { continue };
            recovered.opened_records += 1;
            // A record of a kind that is not needed here.
            let _read = tree.add(row_key, &plain);
        }
        tree
    }

    fn add(&mut self, row_key: &[u8], plain: &[u8]) -> Option<()> {
        let mut numbers = Input(row_key.get(3..)?);
        let mut input = Input(plain);
        match row_key.get(2)? {
            b'I' => {
                let inode = numbers.u64()?;
                let (_version, kind) = (input.u8()?, input.u8()?);
                input.take(2 + 4 + 12)?;
                let size = input.u64()?;
                input.take(16 + 4 * 12 + 16 + 4)?;
                let wrapped = input.field()?.to_vec();
                self.nodes.insert(inode, Node { kind, size, wrapped });
            }
            b'D' => {
                let directory = numbers.u64()?;
                if input.u8()? == 1 {
                    let (child, _kind) = (input.u64()?, input.u8()?);
                    let name = String::from_utf8_lossy(input.field()?).into_owned();
                    self.names.insert(child, (directory, name));
                }
            }
            b'C' => {
                let place = (numbers.u64()?, numbers.u64()?);
                input.u8()?;
                let run = input.u64()?;
                let states = input.take(CHUNK_BLOCKS)?;
                let mut blocks = Vec::with_capacity(CHUNK_BLOCKS);
                for state in states {
                    blocks.push(match state {
                        2 | 3 => {
                            let is_inline = *state == 2;
                            let length = if is_inline { input.u16()? } else { BLOCK as u16 };
                            Block::Sealed {
                                length,
                                nonce: input.take(NONCE)?.try_into().ok()?,
                                tag: input.take(TAG)?.try_into().ok()?,
                                is_inline,
                            }
                        }
                        _ => Block::Hole,
                    });
                }
                self.chunks.insert(place, Chunk { run, blocks });
            }
            _ => {}
        }
        Some(())
    }

    fn path(&self, inode: u64) -> String {
        let mut names = Vec::new();
        let mut at = inode;
        // Directories that a damaged copy makes a circle of end somewhere.
        while at != ROOT_INODE && names.len() < 1024 {
            let Some((directory, name)) = self.names.get(&at) else {
                names.push(format!("inode {at}"));
                break;
            };
            names.push(name.clone());
            at = *directory;
        }
        names.reverse();
        names.join("/")
    }
}
