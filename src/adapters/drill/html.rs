//! A document as one page that a person understands: no script, nothing from elsewhere. What pages have in common, and that of a
//! report.

use super::timeline::{Access, Record, parse};
use serde_json::Value;
use std::fmt::Write as _;

/// Columns of a chart, and its measures in pixels.
const COLUMNS: usize = 360;
const LEFT: usize = 230;
const COLUMN: usize = 2;
const ROW: usize = 20;
const TOP: usize = 46;
/// What is shown before the call, and after the key was given back, at most.
const MARGIN_NS: u64 = 700_000_000;

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:1040px;margin:2em auto;padding:0 1em;color:#1c2330}\
h1{margin-bottom:0}h2{margin-top:2em;border-bottom:1px solid #ccd}table{border-collapse:collapse;width:100%}\
td,th{text-align:left;vertical-align:top;padding:.3em .6em;border-bottom:1px solid #e4e7ee}\
.b{font-weight:700;white-space:nowrap}.PASS{color:#137a3c}.FAIL,.FAILED{color:#b3122b}.NOT,.INCOMPLETE{color:#8a5a00}\
.box{border:2px solid;border-radius:8px;padding:.8em 1em;margin:1em 0}.note{background:#fff7e0;padding:.6em 1em}\
.claim{width:34%}code{font-size:.85em;overflow-wrap:anywhere}svg{width:100%;height:auto;font:12px system-ui,sans-serif}small{color:#566}";

pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            letter => out.push(letter),
        }
    }
    out
}

pub(super) fn text(of: &Value, name: &str) -> String {
    match of.pointer(name) {
        Some(Value::String(text)) => escape(text),
        None | Some(Value::Null) => "not known".to_owned(),
        Some(other) => escape(&other.to_string()),
    }
}

pub(super) fn list<'v>(of: &'v Value, name: &str) -> &'v [Value] {
    of.get(name)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

fn number(of: &Value, name: &str) -> Option<u64> {
    of.pointer(name).and_then(Value::as_u64)
}

/// The page of a report; `public_key` signed its file, whose SHA-256 is `digest`.
#[must_use]
pub fn page(report: &Value, public_key: &str, digest: &str) -> String {
    let mut page = String::new();
    // Writing to a string does not fail.
    let _written = write_page(&mut page, report, public_key, digest);
    page
}

fn write_page(out: &mut String, report: &Value, public_key: &str, digest: &str) -> std::fmt::Result {
    begin(
        out,
        report,
        "Drill report",
        &["/time/began", "/host/name", "/mode"],
    )?;
    notes(
        out,
        report,
        &[
            ("This is not a destruction record.", "/not_a_destruction_record"),
            ("Clock:", "/clock"),
        ],
    )?;
    writeln!(
        out,
        "<p><b>Erasure = {}</b> (root slot: {}). {RENDERING}</p>",
        text(report, "/erasure"),
        text(report, "/root_slot"),
    )?;
    checks(out, report)?;
    out.push_str("<h2>Timeline</h2>\n<p>Each row is a way to get at the data. Green: accesses succeeded. Grey: they were \
                  refused. Red: one that began after DisableKey had returned succeeded. White: none was made, or one waits for a process \
                  that was stopped. The log has every access.</p>\n");
    for phase in list(report, "phases") {
        chart(out, report, phase)?;
    }
    out.push_str("<h2>Facts</h2>\n");
    facts(out, report, &FACTS)?;
    let logs = list(report, "logs").iter().chain(list(report, "recovery_runs"));
    let logs = logs.map(|log| (text(log, "/name"), text(log, "/sha256")));
    end(out, report, logs, public_key, digest)
}

/// What a page is worth.
pub(super) const RENDERING: &str = "This page is a rendering. What counts is the signed file: check it with <code>cmkfs drill \
    verify FILE --key PUBKEY</code>, with a key that you had before.";

/// The head of a page: what it is, then what it comes to.
pub(super) fn begin(out: &mut String, document: &Value, title: &str, line: &[&str]) -> std::fmt::Result {
    let result = text(document, "/result");
    let meaning = match result.as_str() {
        "PASS" => "Every check was made, and held.",
        "INCOMPLETE" => {
            "Everything that was tested held. Something was not tested, and nothing may be concluded about it; see below."
        }
        _ => "Something did not hold; see below.",
    };
    let title = escape(title);
    let line: Vec<String> = line.iter().map(|pointer| text(document, pointer)).collect();
    writeln!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>{title}: {result}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{}</p>\n\
         <div class=\"box {result}\"><span class=\"b\">{result}</span> &#8211; {meaning}</div>",
        line.join(" &#183; "),
    )
}

/// What must not be overlooked.
pub(super) fn notes(out: &mut String, document: &Value, notes: &[(&str, &str)]) -> std::fmt::Result {
    for (what, pointer) in notes {
        writeln!(
            out,
            "<p class=\"note\"><b>{what}</b> {}</p>",
            text(document, pointer)
        )?;
    }
    Ok(())
}

pub(super) fn checks(out: &mut String, document: &Value) -> std::fmt::Result {
    let checks = list(document, "checks");
    let has_steps = checks.iter().any(|check| check.get("step").is_some());
    let step = |cell: String| if has_steps { cell } else { String::new() };
    writeln!(
        out,
        "<h2>What was checked</h2>\n<table><tr>{}<th>result</th><th class=\"claim\">claim</th><th>what was seen</th></tr>",
        step("<th>step</th>".to_owned()),
    )?;
    for check in checks {
        let result = text(check, "/result");
        writeln!(
            out,
            "<tr>{}<td class=\"b {result}\">{result}</td><td>{}</td><td><small>{}</small></td></tr>",
            step(format!("<td>{}</td>", text(check, "/step"))),
            text(check, "/claim"),
            text(check, "/detail"),
        )?;
    }
    out.push_str("</table>\n");
    Ok(())
}

pub(super) fn facts(out: &mut String, document: &Value, facts: &[(&str, &str)]) -> std::fmt::Result {
    out.push_str("<table>\n");
    for (name, pointer) in facts {
        writeln!(
            out,
            "<tr><th>{name}</th><td>{}</td></tr>",
            text(document, pointer)
        )?;
    }
    out.push_str("</table>\n");
    Ok(())
}

/// The foot of a page: what is out of reach, and the digests of what it follows from.
pub(super) fn end(
    out: &mut String,
    document: &Value,
    evidence: impl Iterator<Item = (String, String)>,
    public_key: &str,
    digest: &str,
) -> std::fmt::Result {
    out.push_str("<h2>Out of reach</h2>\n<ul>\n");
    for limit in list(document, "limits") {
        writeln!(out, "<li>{}</li>", escape(limit.as_str().unwrap_or_default()))?;
    }
    out.push_str("</ul>\n<h2>Evidence</h2>\n<table>\n");
    for (name, digest) in evidence {
        writeln!(
            out,
            "<tr><th>{name}</th><td><code>SHA-256 {digest}</code></td></tr>"
        )?;
    }
    write!(
        out,
        "<tr><th>signed file</th><td><code>SHA-256 {}</code></td></tr>\n<tr><th>signed with</th><td><code>Ed25519 {}</code></td></tr>\n\
         </table>\n</body></html>\n",
        escape(digest),
        escape(public_key),
    )
}

const FACTS: [(&str, &str); 24] = [
    ("Challenge", "/nonce"),
    ("Origin of the challenge", "/nonce_origin"),
    ("Operator", "/operator"),
    ("Witness", "/witness"),
    ("Ended", "/time/ended"),
    ("Kernel", "/host/kernel"),
    ("Tool", "/tool/name"),
    ("Version", "/tool/version"),
    ("Media", "/media/what"),
    ("Method", "/method"),
    ("Key", "/key/arn"),
    ("Origin of the key", "/key/origin"),
    ("Specification", "/key/spec"),
    ("Strength in bits", "/key/strength_bits"),
    ("Version of the key", "/key/version"),
    ("Hierarchy", "/key_hierarchy"),
    ("Always encrypted", "/always_encrypted"),
    ("Algorithms", "/algorithms"),
    ("Known copies: backups", "/known_copies/backups"),
    ("Known copies: escrow", "/known_copies/escrow"),
    ("Known copies: snapshots", "/known_copies/snapshots"),
    ("Known copies: customer's", "/known_copies/customers"),
    ("Unknown copies", "/known_copies/unknown"),
    ("Observer", "/observer"),
];

/// What happened in a column: nothing, refusals, successes, successes that must not be.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    Nothing,
    Refused,
    Succeeded,
    Wrong,
}

fn chart(out: &mut String, report: &Value, phase: &Value) -> std::fmt::Result {
    let log = phase.get("log");
    let lines = list(report, "logs")
        .iter()
        .find(|candidate| candidate.get("name") == log);
    let lines: Vec<&str> = lines
        .map(|log| list(log, "lines"))
        .unwrap_or_default()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let records = parse(&format!("{}\n", lines.join("\n"))).unwrap_or_default();
    let (Some(called), Some(returned), Some(until)) = (
        number(phase, "/called_ns"),
        number(phase, "/returned_ns"),
        number(phase, "/until_ns"),
    ) else {
        return Ok(());
    };
    let before = number(phase, "/before/at_ns");
    let first = records.first().map_or(0, |record| record.begin_ns);
    let from = before
        .unwrap_or(called)
        .min(called)
        .saturating_sub(MARGIN_NS)
        .max(first.min(called));
    let last = records.iter().map(|record| record.end_ns).max().unwrap_or(until);
    let to = last
        .min(until.max(number(phase, "/enabled_ns").unwrap_or(0)) + MARGIN_NS)
        .max(until);
    let span = (to - from).max(1);
    let column = |at: u64| {
        let share = u128::from(at.saturating_sub(from)) * COLUMNS as u128 / u128::from(span);
        usize::try_from(share).unwrap_or(COLUMNS).min(COLUMNS - 1)
    };
    let height = TOP + Access::ALL.len() * ROW + 26;
    let width = LEFT + COLUMNS * COLUMN + 12;
    writeln!(
        out,
        "<h3>{}: DisableKey took {} ms</h3>\n<p>{}</p>\n<svg viewBox=\"0 0 {width} {height}\" xmlns=\"http://www.w3.org/2000/svg\" role=\"img\">",
        text(phase, "/name"),
        returned.saturating_sub(called) / 1_000_000,
        match phase
            .get("before")
            .and_then(|before| before.get("what"))
            .and_then(Value::as_str)
        {
            None => "The mount goes dark by itself, and says so before the call returns.".to_owned(),
            Some(what) => format!(
                "Before the call {}. What the kernel had cached stays readable until kmsd has it dropped, which it does before the \
                 call returns.",
                escape(what)
            ),
        },
    )?;
    for (row, access) in Access::ALL.into_iter().enumerate() {
        let top = TOP + row * ROW;
        writeln!(
            out,
            "<text x=\"0\" y=\"{}\">{}</text>",
            top + 13,
            escape(access.title())
        )?;
        let own = records.iter().filter(|record| record.access == access);
        let seen = columns(own, column, (returned, until));
        let mut start = 0;
        while let Some(first) = seen.get(start).copied() {
            let length = seen.iter().skip(start).take_while(|seen| **seen == first).count();
            let colour = match first {
                Seen::Nothing => "#f3f4f7",
                Seen::Refused => "#8b95a7",
                Seen::Succeeded => "#2f9e5b",
                Seen::Wrong => "#d11a36",
            };
            writeln!(
                out,
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{colour}\"/>",
                LEFT + start * COLUMN,
                top + 2,
                length * COLUMN,
                ROW - 4
            )?;
            start += length;
        }
    }
    let marks = [
        before.map(|at| (at, "signal", 12)),
        Some((called, "call", 26)),
        Some((returned, "returned", 40)),
        number(phase, "/enabled_ns").map(|at| (at, "key back", 26)),
    ];
    for (at, label, y) in marks.into_iter().flatten() {
        let x = LEFT + column(at) * COLUMN;
        writeln!(
            out,
            "<line x1=\"{x}\" x2=\"{x}\" y1=\"{y}\" y2=\"{}\" stroke=\"#1c2330\"/><text x=\"{}\" y=\"{y}\">{label}</text>",
            height - 22,
            x + 3
        )?;
    }
    writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{0}\">0 s</text><text x=\"{1}\" y=\"{0}\" text-anchor=\"end\">{2}.{3:03} s</text></svg>",
        height - 6,
        width - 12,
        span / 1_000_000_000,
        span / 1_000_000 % 1000
    )
}

fn columns<'r>(
    records: impl Iterator<Item = &'r Record>,
    column: impl Fn(u64) -> usize,
    (returned, until): (u64, u64),
) -> Vec<Seen> {
    let mut seen = vec![Seen::Nothing; COLUMNS];
    for record in records {
        let is_late = record.begin_ns > returned && record.end_ns < until;
        let what = match (record.succeeded(), is_late) {
            (true, true) => Seen::Wrong,
            (true, false) => Seen::Succeeded,
            (false, _) => Seen::Refused,
        };
        if let Some(place) = seen.get_mut(column(record.begin_ns)) {
            *place = what.max(*place);
        }
    }
    // Between two accesses of one outcome there was no other: a pause is no gap.
    let mut last = Seen::Nothing;
    let mut empty = 0;
    for place in &mut seen {
        if *place == Seen::Nothing && empty < 4 {
            empty += 1;
            *place = last.min(Seen::Succeeded);
        } else if *place != Seen::Nothing {
            last = *place;
            empty = 0;
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_written_by_others_is_shown_as_text() {
        let report = json!({
            "result": "FAILED",
            "operator": "<script>alert(1)</script>",
            "checks": [{ "step": 1, "result": "FAIL", "claim": "a < b & c", "detail": "\"" }],
        });
        let page = page(&report, "00", "11");
        assert!(!page.contains("<script>") && page.contains("a &lt; b &amp; c"));
        assert!(page.contains("not a destruction record"));
    }
}
