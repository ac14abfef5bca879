//! A record as one page that a person understands.

use super::super::document::Kind;
use super::super::html::{RENDERING, begin, checks, end, facts, list, notes, text};
use serde_json::Value;
use std::fmt::Write as _;

/// The page of a record; `public_key` signed its file, whose SHA-256 is `digest`.
#[must_use]
pub fn page(record: &Value, public_key: &str, digest: &str) -> String {
    let mut page = String::new();
    // Writing to a string does not fail.
    let _written = write_page(&mut page, record, public_key, digest);
    page
}

fn write_page(out: &mut String, record: &Value, public_key: &str, digest: &str) -> std::fmt::Result {
    let title = record.get("title").and_then(Value::as_str).unwrap_or_default();
    begin(out, record, title, &["/time/recorded", "/host/name", "/document"])?;
    writeln!(out, "<p>{}</p>", text(record, "/statement"))?;
    let mut must_be_seen = vec![
        ("What it is worth:", "/erasure_worth"),
        ("Copies:", "/known_copies/unknown"),
        ("This is not a drill report.", "/not_a_drill_report"),
        ("Clock:", "/clock"),
    ];
    if Kind::of(record) == Some(Kind::RemovalRecord) {
        must_be_seen.insert(0, ("Imported material:", "/known_copies/customers"));
    }
    notes(out, record, &must_be_seen)?;
    writeln!(out, "<p>{RENDERING}</p>\n<h2>The key</h2>")?;
    facts(out, record, &KEY)?;
    out.push_str("<table>\n<tr><th>version</th><th>made</th></tr>\n");
    for version in record
        .get("key")
        .map(|key| list(key, "versions"))
        .unwrap_or_default()
    {
        writeln!(
            out,
            "<tr><td>{}</td><td>{}</td></tr>",
            text(version, "/id"),
            text(version, "/created")
        )?;
    }
    out.push_str("</table>\n<h2>How</h2>\n");
    facts(out, record, &METHOD)?;
    dependants(out, record)?;
    out.push_str("<h2>Known copies</h2>\n");
    facts(out, record, &COPIES)?;
    checks(out, record)?;
    audit(out, record)?;
    out.push_str("<h2>Who and where</h2>\n");
    facts(out, record, &PEOPLE)?;
    let quoted = record
        .get("audit")
        .map(|audit| list(audit, "quoted"))
        .unwrap_or_default();
    let quoted = quoted.iter().map(|entry| {
        (
            format!("audit record {}", text(entry, "/number")),
            text(entry, "/sha256"),
        )
    });
    end(out, record, quoted, public_key, digest)
}

fn dependants(out: &mut String, record: &Value) -> std::fmt::Result {
    writeln!(
        out,
        "<h2>What depended on it</h2>\n<p>{}</p>\n<table>\n<tr><th>where</th><th>volume</th><th>domain</th><th>files</th>\
         <th>bytes</th><th>last report</th></tr>",
        text(record, "/dependants/note"),
    )?;
    let known = record
        .get("dependants")
        .map(|dependants| list(dependants, "known"))
        .unwrap_or_default();
    for one in known {
        let cells = ["/location", "/volume", "/domain", "/files", "/bytes", "/reported"];
        let cells: String = cells
            .iter()
            .map(|pointer| format!("<td>{}</td>", text(one, pointer)))
            .collect();
        writeln!(out, "<tr>{cells}</tr>")?;
    }
    if known.is_empty() {
        out.push_str("<tr><td colspan=\"6\">nothing is known</td></tr>\n");
    }
    out.push_str("</table>\n");
    Ok(())
}

fn audit(out: &mut String, record: &Value) -> std::fmt::Result {
    out.push_str("<h2>What the audit log has of the key</h2>\n");
    let Some(audit) = record.get("audit") else {
        return Ok(());
    };
    if audit.get("read") != Some(&Value::Bool(true)) {
        out.push_str("<p>It was not read.</p>\n");
        return Ok(());
    }
    out.push_str("<table>\n<tr><th>record</th><th>time</th><th>call</th><th>outcome</th><th>uid</th></tr>\n");
    for entry in list(audit, "quoted") {
        let cells = ["/number", "/time", "/operation", "/code", "/uid"];
        let cells: String = cells
            .iter()
            .map(|pointer| format!("<td>{}</td>", text(entry, pointer)))
            .collect();
        writeln!(out, "<tr>{cells}</tr>")?;
    }
    out.push_str("</table>\n");
    Ok(())
}

const KEY: [(&str, &str); 13] = [
    ("ARN", "/key/arn"),
    ("Id", "/key/id"),
    ("Description", "/key/description"),
    ("Origin", "/key/origin"),
    ("Specification", "/key/spec"),
    ("Strength in bits", "/key/strength_bits"),
    ("Protection level", "/key/protection_level"),
    ("Made", "/key/created"),
    ("Made by uid", "/key/creator_uid"),
    ("Deletion asked for", "/key/deletion_asked_for"),
    ("Deletion due", "/key/deletion_due"),
    ("At its end", "/key/ended"),
    ("Material gone", "/key/material_gone"),
];

const METHOD: [(&str, &str); 11] = [
    ("Method", "/method/what"),
    ("Category", "/method/category"),
    ("Root epoch before", "/method/epoch_before"),
    ("Root epoch after", "/method/epoch_after"),
    ("Root slot", "/root_slot"),
    ("Erasure", "/erasure"),
    ("Erasure is worth", "/erasure_worth"),
    ("Hierarchy", "/key_hierarchy"),
    ("Always encrypted", "/always_encrypted"),
    ("Algorithms", "/algorithms"),
    ("Media", "/media/what"),
];

const COPIES: [(&str, &str); 6] = [
    ("Named by the operator", "/known_copies/named"),
    ("Backups", "/known_copies/backups"),
    ("Escrow", "/known_copies/escrow"),
    ("Snapshots", "/known_copies/snapshots"),
    ("Customer's", "/known_copies/customers"),
    ("Unknown copies", "/known_copies/unknown"),
];

const PEOPLE: [(&str, &str); 15] = [
    ("Operator", "/operator"),
    ("Witness", "/witness"),
    ("Recorded", "/time/recorded"),
    ("By kmsd's clock", "/time/by_kmsd"),
    ("Challenge", "/nonce"),
    ("Origin of the challenge", "/nonce_origin"),
    ("Keystore", "/keystore/id"),
    ("Its epoch", "/keystore/epoch"),
    ("Its state_seq", "/keystore/state_seq"),
    ("Its audit records", "/keystore/audit_records"),
    ("Its audit head", "/keystore/audit_head"),
    ("Account", "/keystore/account"),
    ("Kernel", "/host/kernel"),
    ("Tool", "/tool/name"),
    ("Version", "/tool/version"),
];
