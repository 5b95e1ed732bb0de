//! `conclave check-data`: what a data directory holds, and whether it verifies.

use std::error::Error;

use conclave_server::{
    inspect::{Checkpoint, Inspection, inspect, log},
    storage::StorageError,
};
use serde_json::{Value, json};

use crate::{
    cli::{CheckDataArgs, Global},
    failure::{DAMAGED, Failure, GENERAL},
    output::{self, Format, hex},
};

pub(crate) fn run(args: &CheckDataArgs, global: &Global) -> Result<u8, Failure> {
    let inspection =
        inspect(&args.data_dir).map_err(|error| Failure::new(GENERAL, in_full(&error)))?;
    match global.output {
        Format::Json => output::json(&as_json(&inspection))?,
        Format::Table => output::table(&["WHAT", "STATE", "DETAILS"], &rows(&inspection))?,
    }
    match &inspection.start {
        Err(refusal) => {
            let message = format!("a start would be refused: {}", in_full(refusal));
            Err(Failure::new(GENERAL, message))
        }
        Ok(_) if inspection.is_whole() => Ok(0),
        Ok(_) => Ok(DAMAGED),
    }
}

/// An error with what caused it.
fn in_full(error: &StorageError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

type Row = Vec<String>;

fn row(what: &str, state: &str, details: String) -> Row {
    vec![what.to_owned(), state.to_owned(), details]
}

fn rows(inspection: &Inspection) -> Vec<Row> {
    let mut rows = match &inspection.log {
        Some(log) => log_rows(log),
        None if inspection.start.is_ok() => {
            vec![row("log", "none", "an empty directory".to_owned())]
        }
        None => vec![row("log", "damaged", "see start".to_owned())],
    };
    rows.extend(inspection.checkpoints.iter().map(checkpoint_row));
    rows.push(match &inspection.start {
        Ok(start) => {
            let from = match start.checkpoint {
                Some(at) => format!("checkpoint {at} and "),
                None => String::new(),
            };
            let details = format!("from {from}{} entries of the log", start.entries);
            row("start", "ok", details)
        }
        Err(_) => row("start", "refused", "why is said below".to_owned()),
    });
    rows
}

fn log_rows(log: &log::Inspection) -> Vec<Row> {
    let recovered = &log.recovered;
    let (identity, hard_state) = (&recovered.identity, &recovered.hard_state);
    let identity = format!(
        "cluster {}, member {}, incarnation {}",
        hex(identity.cluster),
        hex(identity.node.0),
        hex(identity.incarnation)
    );
    let voters: Vec<String> = recovered.facts.voters.iter().map(|n| hex(n.0)).collect();
    let admitted = if recovered.facts.admitted {
        "may vote"
    } else {
        "may not vote yet"
    };
    let vote = match hard_state.vote {
        0 => "nobody".to_owned(),
        node => hex(node),
    };
    let (term, commit) = (hard_state.term, hard_state.commit);
    let next = recovered.first + recovered.entries.len() as u64;
    let entries = if recovered.entries.is_empty() {
        format!("no entries; the next is {next}")
    } else {
        format!("entries {} to {}", recovered.first, next - 1)
    };
    let attested = match log.unattested_bytes {
        0 => "all attested".to_owned(),
        bytes => format!("the last {bytes} bytes are not attested"),
    };
    let segments = log.segments.iter();
    let segments =
        segments.map(|(name, bytes)| row("segment", "ok", format!("{name}, {bytes} bytes")));
    let mut rows = vec![
        row("identity", "ok", identity),
        row(
            "membership",
            "ok",
            format!("{admitted}; voters {}", voters.join(", ")),
        ),
        row(
            "term",
            "ok",
            format!("{term}, vote for {vote}, commit {commit}"),
        ),
        row("log", "ok", format!("{entries}; {attested}")),
    ];
    rows.extend(segments);
    rows
}

fn checkpoint_row(checkpoint: &Checkpoint) -> Vec<String> {
    let Checkpoint { at, bytes, content } = checkpoint;
    let (state, details) = match content {
        Ok(content) => (
            "ok",
            format!(
                "term {}, {} versions, {} sessions, digest {:016x}, {bytes} bytes",
                content.term, content.versions, content.sessions, content.digest
            ),
        ),
        Err(reason) => ("damaged", reason.clone()),
    };
    vec![format!("checkpoint {at}"), state.to_owned(), details]
}

fn as_json(inspection: &Inspection) -> Value {
    let checkpoints = inspection.checkpoints.iter().map(checkpoint_json);
    let start = match &inspection.start {
        Ok(start) => json!({
            "ok": true,
            "checkpoint": start.checkpoint,
            "entries": start.entries,
        }),
        Err(refusal) => json!({ "ok": false, "error": in_full(refusal) }),
    };
    json!({
        "whole": inspection.is_whole(),
        "log": inspection.log.as_ref().map(log_json),
        "checkpoints": checkpoints.collect::<Vec<_>>(),
        "start": start,
    })
}

fn log_json(log: &log::Inspection) -> Value {
    let recovered = &log.recovered;
    let segment = |(name, bytes): &(String, u64)| json!({ "file": name, "bytes": bytes });
    let voters = recovered.facts.voters.iter().map(|node| hex(node.0));
    json!({
        "cluster_id": hex(recovered.identity.cluster),
        "member_id": hex(recovered.identity.node.0),
        "incarnation": hex(recovered.identity.incarnation),
        "term": recovered.hard_state.term,
        "vote": hex(recovered.hard_state.vote),
        "commit": recovered.hard_state.commit,
        "admitted": recovered.facts.admitted,
        "voters": voters.collect::<Vec<_>>(),
        "first_index": recovered.first,
        "next_index": recovered.first + recovered.entries.len() as u64,
        "end": log.end,
        "unattested_bytes": log.unattested_bytes,
        "segments": log.segments.iter().map(segment).collect::<Vec<_>>(),
    })
}

fn checkpoint_json(checkpoint: &Checkpoint) -> Value {
    let Checkpoint { at, bytes, content } = checkpoint;
    match content {
        Ok(content) => json!({
            "index": at,
            "bytes": bytes,
            "ok": true,
            "cluster_id": hex(content.cluster),
            "term": content.term,
            "digest": hex(content.digest),
            "versions": content.versions,
            "sessions": content.sessions,
        }),
        Err(reason) => json!({
            "index": at,
            "bytes": bytes,
            "ok": false,
            "error": reason,
        }),
    }
}
