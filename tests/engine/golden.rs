//! A volume that format version 1 wrote: every later version opens it.
//!
//! With `CMKFS_WRITE_GOLDEN` set to a directory that is not there, the test writes such a volume instead. Its key is
//! in tests/engine/support.rs, so it protects nothing.

use crate::support::{Fixture, copy_dir};
use crate::tree;
use cmkfs::engine::{CreateParams, Volume};
use std::path::PathBuf;

#[test]
fn version_1_is_read_for_ever() {
    let fixture = Fixture::new();
    if let Some(dir) = std::env::var_os("CMKFS_WRITE_GOLDEN").map(PathBuf::from) {
        let params = CreateParams {
            cmk_arn: "acs:kms:local:1:key/golden".to_owned(),
            uid: 0,
            gid: 0,
        };
        Volume::create(&dir, &params, &*fixture.kms, *b"golden volume v1").unwrap();
        let volume = fixture.try_open_at(&dir).unwrap();
        tree::make(&volume);
        volume.close().unwrap();
        return;
    }
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/volume-1");
    let copy = fixture.scratch.path().join("golden");
    copy_dir(&golden, &copy);
    let volume = fixture.try_open_at(&copy).unwrap();
    assert_eq!(tree::check(&volume), 0);
    assert_eq!(volume.status().inodes, 13);
    volume.close().unwrap();
    drop(volume);
    assert_eq!(tree::check(&fixture.try_open_at(&copy).unwrap()), 0);
}
