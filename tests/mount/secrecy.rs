//! What a mount and its kmsd hold in memory: keys and content while the key is enabled, nothing of them once it is
//! disabled.

use crate::world::{World, errno, noise};
use kms_client::{Client, EncryptionContext};
use kms_crypto::{KeySalt, Label, NONCE_LEN, Nonce, Sealer, SecretKey, TAG_LEN, Tag, derive};
use rocksdb::{DB, IteratorMode, Options};
use secret_search::{Findings, Needles, WINDOW, exposure};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

const SIZE: usize = 1 << 20;
/// Searches before a secret counts as one that stays. Each takes a good part of a second; going dark takes less than that.
const SEARCHES: usize = 40;

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        match entry.file_type().unwrap().is_dir() {
            true => copy_dir(&entry.path(), &to.join(entry.file_name())),
            false => drop(fs::copy(entry.path(), to.join(entry.file_name())).unwrap()),
        }
    }
}

/// Every row of a family of a database in use.
fn rows(database: &Path, scratch: &Path, family: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
    copy_dir(database, scratch);
    let options = Options::default();
    let families = DB::list_cf(&options, scratch).unwrap();
    let db = DB::open_cf_for_read_only(&options, scratch, families, false).unwrap();
    let handle = db.cf_handle(family).unwrap();
    let rows = db.iterator_cf(handle, IteratorMode::Start);
    rows.map(|row| row.unwrap())
        .map(|(key, value)| (key.into_vec(), value.into_vec()))
        .collect()
}

fn key_of(bytes: &[u8]) -> SecretKey {
    SecretKey::fill_with(|out| {
        out.copy_from_slice(bytes);
        Ok::<(), ()>(())
    })
    .unwrap()
}

/// Opens nonce, tag, ciphertext.
fn open_record(sealer: &Sealer, aad: &[u8], row: &[u8]) -> Option<Vec<u8>> {
    let (nonce, rest) = row.split_first_chunk::<NONCE_LEN>()?;
    let (tag, body) = rest.split_first_chunk::<TAG_LEN>()?;
    let mut plain = body.to_vec();
    let opened = sealer.open(Nonce(*nonce), aad, &mut plain, Tag(*tag));
    opened.ok().map(|()| plain)
}

/// The keys of a mounted volume, as anybody can have them whom kmsd lets open a session.
fn add_volume_keys(world: &World, needles: &mut Needles) {
    let superblock = fs::read(world.volume().join("superblock")).unwrap();
    let volume: [u8; 16] = superblock[12..28].try_into().unwrap();
    let arn_end = 30 + usize::from(u16::from_be_bytes([superblock[28], superblock[29]]));
    let hash = Sha256::digest(&superblock[..arn_end]).into();
    let client = Client::connect(&world.socket(), Duration::from_secs(5)).unwrap();
    let session = client.open_session(volume, 0, Duration::ZERO).unwrap();
    let open = |context, wrapped: &[u8]| {
        let mut opened = session.open_data_keys(&[(context, wrapped.to_vec())]).unwrap();
        opened.pop().unwrap()
    };
    let vk = open(
        EncryptionContext::volume_key(volume, 0, hash),
        &superblock[arn_end + 2..],
    );
    let vk = vk.ok().unwrap();
    needles.add_key("volume key", vk.expose());
    let records = derive(&vk, KeySalt(&volume), Label::VolumeRecords { domain: 0 });
    needles.add_key("record key", records.expose());
    let names = derive(&vk, KeySalt(&volume), Label::VolumeNames { domain: 0 });
    needles.add_key("name key", names.expose());

    // Wherever a record holds a wrapped key, it begins so (docs/kms-format.md).
    let key_id = uuid::Uuid::parse_str(&world.key).unwrap();
    let blob = [b"\x01\x05local".as_slice(), key_id.as_bytes()].concat();
    let sealer = Sealer::new(records);
    let mut files = 0;
    for (key, row) in rows(&world.volume().join("meta"), &world.path("meta-copy"), "meta") {
        let aad = [b"cmkfs\x01r\x01".as_slice(), &volume, &[0, 0, 1], &key].concat();
        let Some(record) = open_record(&sealer, &aad, &row) else {
            continue;
        };
        let at = record.windows(blob.len()).position(|window| window == blob);
        let (b'I', Some(at)) = (key[2], at) else { continue };
        let inode = u64::from_be_bytes(key[3..11].try_into().unwrap());
        let wrapped = &record[at..at + 2 + 5 + 16 + 16 + 16 + 32 + TAG_LEN];
        let dek = open(EncryptionContext::data_key(volume, 0, inode), wrapped);
        let dek = dek.ok().unwrap();
        needles.add_key(&format!("data key {files}"), dek.expose());
        let content = derive(&dek, KeySalt(&volume), Label::FileContent { domain: 0 });
        needles.add_key(&format!("file key {files}"), content.expose());
        files += 1;
    }
    assert!(files >= 2, "the volume's files have keys");
    session.close().unwrap();
}

/// The material of the CMK, as the keystore and its slot give it, and every key on the way to it.
fn add_material(world: &World, needles: &mut Needles) {
    let slot = fs::read(world.keystore().join("slot-1")).unwrap();
    let root = fs::read(world.keystore().join("root-1")).unwrap();
    let keystore = &slot[10..26];
    let salt = KeySalt(keystore);
    let kek = derive(&key_of(&slot[34..66]), salt, Label::KeystoreRoot);
    let (header, rest) = root.split_at(33);
    let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>().unwrap();
    let (sealed, tag) = rest.split_last_chunk::<TAG_LEN>().unwrap();
    let mut text = sealed.to_vec();
    Sealer::new(kek)
        .open(Nonce(*nonce), header, &mut text, Tag(*tag))
        .unwrap();
    needles.add_key("root key", text.as_slice().try_into().unwrap());
    let material = Sealer::new(derive(&key_of(&text), salt, Label::KeystoreMaterial));
    let found = rows(
        &world.keystore().join("db"),
        &world.path("keystore-copy"),
        "material",
    );
    assert_eq!(found.len(), 1);
    for (key, value) in found {
        let fields: [&[u8]; 3] = [keystore, b"material", &key];
        let prefixed = fields.map(|field| [&(field.len() as u32).to_be_bytes(), field].concat());
        let (nonce, rest) = value[1..].split_first_chunk::<NONCE_LEN>().unwrap();
        let (text, tag) = rest.split_last_chunk::<TAG_LEN>().unwrap();
        let mut text = text.to_vec();
        material
            .open(Nonce(*nonce), &prefixed.concat(), &mut text, Tag(*tag))
            .unwrap();
        needles.add_key("material", text.as_slice().try_into().unwrap());
    }
}

/// Searches until nothing is found but what `may_stay`; says what was found last.
fn search_until_gone(needles: &Needles, pid: u32, may_stay: impl Fn(&str) -> bool) -> Findings {
    let mut last = needles.search(pid).unwrap();
    for _ in 0..SEARCHES {
        last.places.retain(|name, _| !may_stay(name));
        if last.places.is_empty() {
            break;
        }
        last = needles.search(pid).unwrap();
    }
    last
}

#[test]
fn a_disabled_key_leaves_no_key_content_or_name_in_memory() {
    let mut world = World::new();
    let mut needles = Needles::default();
    let (read, written) = (noise(11, SIZE), noise(12, SIZE));
    let mut mark = |name: &str, bytes: &[u8]| {
        for (place, at) in [
            ("start", 0),
            ("middle", bytes.len() / 2),
            ("end", bytes.len() - WINDOW),
        ] {
            needles.add(&format!("{name}: {place}"), &bytes[at..]);
        }
    };
    mark("content read", &read);
    mark("content written", &written);
    mark(
        "small content",
        b"a small content that nobody else has, of one block",
    );
    mark("attribute value", b"the value of an attribute of a file");
    mark("name", b"the-name-of-a-file-that-is-read.bin");
    mark("target", b"the/target/of/a/symbolic/link/nowhere");

    let name = "the-name-of-a-file-that-is-read.bin";
    fs::write(world.at(name), &read).unwrap();
    fs::write(
        world.at("small"),
        b"a small content that nobody else has, of one block",
    )
    .unwrap();
    std::os::unix::fs::symlink("the/target/of/a/symbolic/link/nowhere", world.at("link")).unwrap();
    world.unmount();
    world.mount(&[]);
    let (mount, kmsd) = (world.mount_pid(), world.kmsd_pid());
    let handle = File::open(world.at(name)).unwrap();
    let use_everything = |world: &World| {
        assert_eq!(fs::read(world.at(name)).unwrap(), read);
        assert_eq!(fs::read(world.at("small")).unwrap().len(), 50);
        // A part of a block, and a write that stays in the kernel until it is made to go.
        handle.read_at(&mut [0; 100], 5000).unwrap();
        let mut file = File::create(world.at("written")).unwrap();
        file.write_all(&written).unwrap();
        file.sync_all().unwrap();
        file.write_at(&written[..5000], 77).unwrap();
        fs::read_dir(world.mnt())
            .unwrap()
            .for_each(|entry| drop(entry.unwrap()));
        fs::read_link(world.at("link")).unwrap();
        let (attribute, value) = ("user.name", b"the value of an attribute of a file");
        rustix::fs::setxattr(world.at(name), attribute, value, rustix::fs::XattrFlags::empty()).unwrap();
        rustix::fs::getxattr(world.at(name), attribute, &mut [0_u8; 64][..]).unwrap();
        File::open(world.mnt()).unwrap().sync_all().unwrap();
        // Names are forgotten quickly: these requests are the last ones before the search.
        for number in 0..20 {
            fs::create_dir(world.at(&format!("{name}-{number}"))).unwrap();
        }
        for number in 0..20 {
            fs::remove_dir(world.at(&format!("{name}-{number}"))).unwrap();
        }
    };
    use_everything(&world);
    add_volume_keys(&world, &mut needles);
    add_material(&world, &mut needles);

    for round in 0..2 {
        let live = needles.search(mount).unwrap();
        for what in ["record key", "name key", "file key", "content", "name:"] {
            assert!(live.has(what), "round {round}: the search finds the {what}");
        }
        for what in ["volume key", "data key", "root key", "material"] {
            assert!(!live.has(what), "round {round}, live: {:#?}", live.places);
        }
        for (form, places) in &live.places {
            let is_key = form.contains("key");
            assert!(
                !is_key || form.ends_with("half"),
                "round {round}, live: {form} at {places:#?}"
            );
        }
        let live = needles.search(kmsd).unwrap();
        assert!(
            live.has("material"),
            "round {round}: the search finds the material"
        );
        for what in ["root key", "data key", "volume key"] {
            assert!(!live.has(what), "round {round}, kmsd: {:#?}", live.places);
        }

        world.with_key("disable-key");
        let gone = search_until_gone(&needles, kmsd, |_| false);
        assert!(gone.places.is_empty(), "round {round}, kmsd: {:#?}", gone.places);
        let gone = search_until_gone(&needles, mount, |_| false);
        assert!(gone.places.is_empty(), "round {round}: {:#?}", gone.places);
        assert!(
            gone.searched > 1 << 20 && gone.unread.is_empty(),
            "{:?}",
            gone.unread
        );
        assert_eq!(errno(handle.read_at(&mut [0; 16], 0)), libc::EKEYREVOKED);

        world.with_key("enable-key");
        crate::world::eventually("the file can be read again", || {
            handle.read_at(&mut [0; 16], 0).is_ok()
        });
        use_everything(&world);
    }
    drop(handle);
    world.unmount();
}

#[test]
fn a_dark_subtree_leaves_nothing_in_memory_and_a_dark_volume_not_even_its_name() {
    const ROOT: &str = "the-name-of-the-directory-that-begins-a-domain";
    const INNER: &str = "the-name-of-a-file-in-a-domain-of-its-own";
    let mut world = World::new();
    let content = noise(21, SIZE);
    let mut needles = Needles::default();
    needles.add("domain content", &content[SIZE / 2..]);
    needles.add("inner name", INNER.as_bytes());
    needles.add("root name", ROOT.as_bytes());
    let key = world.create_key();
    let root = world.at(ROOT);
    fs::create_dir(&root).unwrap();
    world.cmkfs_ok(&["setkey", root.to_str().unwrap(), "--key-id", &key]);
    fs::write(root.join(INNER), &content).unwrap();
    world.unmount();
    world.mount(&[]);
    let mount = world.mount_pid();
    let use_it = |world: &World| {
        assert_eq!(fs::read(root.join(INNER)).unwrap(), content);
        let entries = fs::read_dir(world.mnt()).unwrap();
        entries.for_each(|entry| drop(entry.unwrap()));
        fs::rename(root.join(INNER), root.join("other")).unwrap();
        fs::rename(root.join("other"), root.join(INNER)).unwrap();
        // Names are forgotten quickly: these requests are the last ones before the search.
        let inner = (0..20).map(|number| root.join(format!("{INNER}-{number}")));
        let outer = (0..20).map(|number| world.at(&format!("{ROOT}-{number}")));
        for name in inner.chain(outer) {
            fs::create_dir(&name).unwrap();
            fs::remove_dir(name).unwrap();
        }
    };
    use_it(&world);
    let live = needles.search(mount).unwrap();
    // What was read is wiped as it is handed over; the test above finds what was written.
    assert!(
        live.has("inner name") || live.has("root name"),
        "{:#?}",
        live.places
    );
    world.kmsctl(&["disable-key", "--key-id", &key]).unwrap();
    let gone = search_until_gone(&needles, mount, |what| what.starts_with("root name"));
    assert!(gone.places.is_empty(), "{:#?}", gone.places);
    world.kmsctl(&["enable-key", "--key-id", &key]).unwrap();
    let is_back = || fs::read(root.join(INNER)).is_ok();
    crate::world::eventually("it can be read again", is_back);
    use_it(&world);
    world.with_key("disable-key");
    let gone = search_until_gone(&needles, mount, |_| false);
    assert!(gone.places.is_empty(), "{:#?}", gone.places);
    world.with_key("enable-key");
    crate::world::eventually("it can be read again", is_back);
    world.unmount();
}

#[test]
fn neither_daemon_leaves_a_core_or_is_swapped() {
    let mut world = World::new();
    fs::write(world.at("file"), noise(3, SIZE)).unwrap();
    let mut content = Vec::new();
    File::open(world.at("file"))
        .unwrap()
        .read_to_end(&mut content)
        .unwrap();
    for pid in [world.mount_pid(), world.kmsd_pid()] {
        assert_eq!(exposure(pid).unwrap(), Vec::<String>::new());
    }
    // Fatal, and one that dumps a core where that is permitted.
    assert!(!world.end_mount(libc::SIGABRT).core_dumped());
    crate::world::detach(&world.mnt());
    world.stop_kmsd(libc::SIGKILL);
}
