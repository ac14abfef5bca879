//! `cmkfs-recover`: what can be had of copies of keystores and volumes, as JSON. Plaintext and keys are not printed: of
//! files the digests, of keys where asked for digests of windows.

use clap::Parser;
use cmkfs_recover::{Given, Outcome, recover};
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Tries to recover files from copies of keystores and volumes. Written from the documents of the formats alone, without the
/// code of the daemons.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Arguments {
    /// A copy of a keystore's directory, whole or in parts; may be given again
    #[arg(long, value_name = "DIR")]
    keystore: Vec<PathBuf>,
    /// A copy of a volume's directory; may be given again
    #[arg(long, value_name = "DIR")]
    volume: Vec<PathBuf>,
    /// A root slot beside those in the copies; may be given again
    #[arg(long, value_name = "FILE")]
    slot: Vec<PathBuf>,
    /// Print digests of what each key looks like in memory, by which it can be looked for and not had
    #[arg(long)]
    windows: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let given = Given {
        keystores: arguments.keystore,
        volumes: arguments.volume,
        slots: arguments.slot,
    };
    match recover(&given) {
        Ok(outcome) => {
            let text = document(&outcome, arguments.windows);
            match writeln!(std::io::stdout(), "{text}") {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(message) => {
            eprintln!("cmkfs-recover: {message}");
            ExitCode::FAILURE
        }
    }
}

fn document(outcome: &Outcome, with_windows: bool) -> Value {
    let opened = &outcome.opened;
    let materials = opened.materials.iter().map(|material| {
        json!({
            "key_id": material.key_id(),
            "version_id": material.version_id(),
            "found_in": material.found_in,
        })
    });
    let volumes = outcome.volumes.iter().map(|volume| {
        let files = volume.files.iter();
        let files = files.map(|file| json!({ "path": file.path, "size": file.size, "sha256": file.sha256 }));
        json!({
            "copy": volume.dir.to_string_lossy(),
            "is_whole": volume.is_whole,
            "records": volume.records,
            "volume_key_opened": volume.has_key,
            "records_opened": volume.opened_records,
            "data_keys_opened": volume.data_keys,
            "files": files.collect::<Value>(),
        })
    });
    let mut document = json!({
        "files_read": outcome.files,
        "bytes_read": outcome.bytes,
        "databases_read": opened.databases,
        "slots_found": opened.slots,
        "slots_of_other_kinds": opened.other_slots,
        "roots_found": opened.roots,
        "roots_opened": opened.opened_roots,
        "material_rows_named": opened.named,
        "materials": materials.collect::<Value>(),
        "volumes": volumes.collect::<Value>(),
        "attempts": {
            "slot_keys_on_roots": opened.attempts.roots,
            "root_keys_on_rows": opened.attempts.rows,
            "root_keys_on_positions": opened.attempts.positions,
            "materials_on_wrapped_keys": opened.attempts.blobs,
        },
    });
    if with_windows && let Some(fields) = document.as_object_mut() {
        let forms = outcome.forms.iter().map(|form| {
            json!({
                "name": form.name,
                "rolling": form.window.rolling,
                "sha256": hex::encode(form.window.sha256),
            })
        });
        fields.insert("windows".to_owned(), forms.collect());
    }
    document
}
