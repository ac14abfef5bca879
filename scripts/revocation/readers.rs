//! The processes that read.
use crate::c;
use crate::log::Log;
use crate::system::{Aligned, Mover, PAGE, map};
use crate::world::{CONTENT_FILES, Random, Role, What, World, content_seed, fill_page};
use std::fs::{self, File, OpenOptions};
use std::io::{Error, Result, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process;

pub fn read_for_ever(world: &World, role: Role, log: Log) -> Result<()> {
    let mut random = Random(u64::from(process::id()) << 32);
    let pages = world.pages();
    let flags = if role == Role::Direct { c::O_DIRECT } else { 0 };
    let files: Vec<File> = (0..CONTENT_FILES)
        .map(|number| {
            OpenOptions::new()
                .read(true)
                .custom_flags(flags)
                .open(world.content_file(number))
        })
        .collect::<Result<_>>()?;
    let how = if role == Role::Private {
        c::MAP_PRIVATE
    } else {
        c::MAP_SHARED
    };
    let maps: Vec<*mut u8> = files
        .iter()
        .map(|file| map(file, pages * PAGE, c::PROT_READ, how))
        .collect::<Result<_>>()?;
    let mut mover = Mover::new()?;
    let mut page_of = Box::new(Aligned([0; PAGE]));
    let mut look = |number: usize, page: usize| match role {
        Role::Buffered | Role::Direct => {
            let count = files[number].read_at(&mut page_of.0, (page * PAGE) as u64)?;
            if count != PAGE {
                return Err(Error::other("a short read"));
            }
            let mut whole = [0; PAGE];
            fill_page(content_seed(number, page), &mut whole);
            Ok(if page_of.0 == whole {
                content_seed(number, page)
            } else {
                !content_seed(number, page)
            })
        }
        // SAFETY: the address lies within the mapping.
        _ => unsafe { mover.load(maps[number].add(page * PAGE)) },
    };
    // What is not cached to begin with would be asked for while the mount is stopped.
    for number in 0..CONTENT_FILES {
        for page in 0..pages.min(256) {
            look(number, page)?;
        }
    }
    ready()?;
    loop {
        let number = random.below(CONTENT_FILES as u64) as usize;
        // Half of the accesses go where everybody's do.
        let reach = if random.below(2) == 0 {
            pages.min(256)
        } else {
            pages
        };
        let page = random.below(reach as u64) as usize;
        if let Ok(word) = log.time(What::Access, || look(number, page))
            && word != content_seed(number, page)
        {
            log.wrong(&format!("{role:?} reader, file {number}, page {page}"));
        }
    }
}

/// Looks at what is no content: names, attributes, targets of links.
pub fn look_for_ever(world: &World, log: Log) -> Result<()> {
    let mut random = Random(u64::from(process::id()) << 32);
    let (held, directory) = (File::open(world.inode(0))?, world.few());
    let held_directory = File::open(&directory)?;
    ready()?;
    loop {
        let inode = world.inode(random.below(world.inodes as u64) as usize);
        let link = directory.join(random.below(16).to_string());
        let _logged = match random.below(6) {
            0 => log.time(What::Access, || fs::symlink_metadata(&inode).map(drop)),
            1 => log.time(What::Access, || fs::read(&inode).map(drop)),
            2 => log.time(What::Access, || fs::read_link(&link).map(drop)),
            3 => log.time(What::Access, || {
                fs::read_dir(&directory)?.try_for_each(|entry| entry.map(drop))
            }),
            4 => log.time(What::Access, || held.metadata().map(drop)),
            _ => log.time(What::Access, || held_directory.metadata().map(drop)),
        };
    }
}

pub fn ready() -> Result<()> {
    println!("ready");
    std::io::stdout().flush()
}
