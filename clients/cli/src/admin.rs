//! Commands that look at a cluster, and those that interfere.

use std::collections::BTreeMap;

use conclave_client::{
    Client, Contender, ElectionInfo, Error, Leader, LockInfo, ServerStatus, SessionInfo,
};
use serde_json::{Value, json};

use crate::{
    cli::{CompactArgs, DEFAULT_ENDPOINT, ElectionsArgs, Global, LocksArgs, UnlockArgs},
    duration,
    failure::{Failure, GENERAL, UNREACHED},
    kv::show,
    output::{self, Format, hex, session_hex, session_value},
};

/// A client of the servers that the command line names.
pub(crate) fn connect(global: &Global) -> Result<Client, Failure> {
    // An empty variable in the environment is as good as none.
    let given: Vec<&String> = global
        .endpoints
        .iter()
        .filter(|text| !text.is_empty())
        .collect();
    if given.is_empty() {
        return Ok(Client::connect([DEFAULT_ENDPOINT])?);
    }
    Ok(Client::connect(given)?)
}

/// `conclave unlock`. The token of the holder that was seen goes along, so that
/// nobody who comes after is hit.
pub(crate) async fn unlock(args: UnlockArgs, global: Global) -> Result<u8, Failure> {
    let client = connect(&global)?;
    let not_held = || Failure::new(GENERAL, format!("nobody holds `{}`", args.name));
    let lock = client.lock_info(&args.name).await?.ok_or_else(not_held)?;
    let holder = lock.holder.ok_or_else(not_held)?;
    let token = Some(holder.token);
    let released = match (args.skip_delay, holder.delay_left_ms) {
        (true, _) => {
            client
                .force_release_at_once(&args.name, &args.reason, token)
                .await
        }
        (false, Some(left_ms)) => return Err(delayed(&args.name, left_ms)),
        (false, None) => client.force_release(&args.name, &args.reason, token).await,
    };
    let released = match released {
        // An attempt before this one may have done it, or the holder itself.
        Err(Error::NotHeld | Error::NotHolder { .. }) => holder,
        released => released?,
    };
    match global.output {
        Format::Json => {
            output::json(&json!({ "lock": args.name, "released": contender(&released) }))?;
        }
        Format::Table => output::text(&format!(
            "`{}` is taken from session {} {}, token {}\n",
            args.name,
            session_hex(released.session_id),
            released.session_name,
            released.token
        ))?,
    }
    Ok(0)
}

fn delayed(name: &str, left_ms: u64) -> Failure {
    let left = duration::show(left_ms);
    let text =
        format!("nobody holds `{name}`: its lock-delay ends in {left}; --skip-delay ends it now");
    Failure::new(GENERAL, text)
}

/// `conclave compact`. Without a revision, up to the highest that any server knows.
pub(crate) async fn compact(args: CompactArgs, global: Global) -> Result<u8, Failure> {
    let client = connect(&global)?;
    let revision = match args.revision {
        Some(revision) => revision,
        None => newest_revision(&client.status().await)?,
    };
    client.compact(revision).await?;
    match global.output {
        Format::Json => output::json(&json!({ "compacted_revision": revision }))?,
        Format::Table => output::text(&format!("history begins with revision {revision} now\n"))?,
    }
    Ok(0)
}

fn newest_revision(servers: &[ServerStatus]) -> Result<u64, Failure> {
    let answered = servers
        .iter()
        .filter_map(|server| server.status.as_ref().ok());
    let revisions = answered.filter_map(|status| status.header.map(|header| header.revision));
    let no_answer = || Failure::new(UNREACHED, "no server answered");
    revisions.max().ok_or_else(no_answer)
}

/// `conclave disarm`.
pub(crate) async fn disarm(global: Global) -> Result<u8, Failure> {
    connect(&global)?.disarm().await?;
    match global.output {
        Format::Json => output::json(&json!({ "disarmed": true }))?,
        Format::Table => output::text("all alarms are cleared\n")?,
    }
    Ok(0)
}

/// `conclave locks`.
pub(crate) async fn locks(args: LocksArgs, global: Global) -> Result<u8, Failure> {
    let client = connect(&global)?;
    let locks = match &args.name {
        Some(name) => client.lock_info(name).await?.into_iter().collect(),
        None => client.locks().await?,
    };
    match global.output {
        Format::Json => {
            let locks: Vec<Value> = locks.iter().map(lock).collect();
            output::json(&json!({ "locks": locks }))?;
        }
        Format::Table => {
            let header = ["LOCK", "PLACE", "TOKEN", "SESSION", "NAME", "OWNER", "FOR"];
            let rows: Vec<Vec<String>> = locks.iter().flat_map(lock_rows).collect();
            output::table(&header, &rows)?;
        }
    }
    Ok(0)
}

/// `conclave elections`.
pub(crate) async fn elections(args: ElectionsArgs, global: Global) -> Result<u8, Failure> {
    let client = connect(&global)?;
    let elections = match &args.name {
        Some(name) => client.election_info(name).await?.into_iter().collect(),
        None => client.elections().await?,
    };
    match global.output {
        Format::Json => {
            let elections: Vec<Value> = elections.iter().map(election).collect();
            output::json(&json!({ "elections": elections }))?;
        }
        Format::Table => {
            let header = [
                "ELECTION", "PLACE", "TERM", "SESSION", "NAME", "OWNER", "FOR", "VALUE",
            ];
            let rows: Vec<Vec<String>> = elections.iter().flat_map(election_rows).collect();
            output::table(&header, &rows)?;
        }
    }
    Ok(0)
}

/// `conclave sessions`.
pub(crate) async fn sessions(global: Global) -> Result<u8, Failure> {
    let sessions = connect(&global)?.sessions().await?;
    match global.output {
        Format::Json => {
            let sessions: Vec<Value> = sessions.iter().map(session).collect();
            output::json(&json!({ "sessions": sessions }))?;
        }
        Format::Table => {
            let header = ["SESSION", "NAME", "TTL", "AGE", "KEYS"];
            let row = |session: &SessionInfo| {
                vec![
                    session_hex(session.session_id),
                    session.name.clone(),
                    duration::show(session.ttl_ms),
                    duration::show(session.age_ms),
                    session.keys.to_string(),
                ]
            };
            output::table(&header, &sessions.iter().map(row).collect::<Vec<_>>())?;
        }
    }
    Ok(0)
}

/// `conclave status`. Fails only if no server answers.
pub(crate) async fn status(global: Global) -> Result<u8, Failure> {
    let servers = connect(&global)?.status().await;
    match global.output {
        Format::Json => {
            let servers: Vec<Value> = servers.iter().map(server).collect();
            output::json(&json!({ "servers": servers }))?;
        }
        Format::Table => {
            let header = [
                "ENDPOINT", "MEMBER", "ROLE", "TERM", "APPLIED", "REVISION", "SESSIONS", "KEYS",
                "ALARMS",
            ];
            output::table(&header, &servers.iter().map(server_row).collect::<Vec<_>>())?;
        }
    }
    if servers.iter().any(|server| server.status.is_ok()) {
        Ok(0)
    } else {
        Err(Failure::new(UNREACHED, "no server answered"))
    }
}

fn lock(lock: &LockInfo) -> Value {
    json!({
        "name": lock.name,
        "holder": lock.holder.as_ref().map(contender),
        "waiters": lock.waiters.iter().map(contender).collect::<Vec<_>>(),
        "waiters_total": lock.waiters_total,
    })
}

fn contender(contender: &Contender) -> Value {
    let mut shown = json!({
        "session_id": session_value(contender.session_id),
        "session_name": contender.session_name,
        "owner": contender.owner,
        "token": contender.token,
        "since_ms": contender.since_ms,
        "place": contender.place,
        "entries": contender.entries,
        "candidate": contender.candidate,
    });
    show::put_bytes(&mut shown, "key", &contender.key);
    if let Some(left_ms) = contender.delay_left_ms {
        shown["delay_left_ms"] = left_ms.into();
    }
    shown
}

fn lock_rows(lock: &LockInfo) -> Vec<Vec<String>> {
    let row = |contender: &Contender| {
        let place = match (contender.place, contender.delay_left_ms) {
            (_, Some(left_ms)) => format!("delay {}", duration::show(left_ms)),
            (0, None) if contender.candidate => "leader".to_owned(),
            (0, None) => "holder".to_owned(),
            (place, None) => place.to_string(),
        };
        vec![
            lock.name.clone(),
            place,
            contender.token.to_string(),
            session_hex(contender.session_id),
            contender.session_name.clone(),
            contender.owner.clone(),
            duration::show(contender.since_ms),
        ]
    };
    lock.holder.iter().chain(&lock.waiters).map(row).collect()
}

fn election(election: &ElectionInfo) -> Value {
    json!({
        "name": election.name,
        "leader": election.leader.as_ref().map(leader),
        "candidates": election.candidates.iter().map(contender).collect::<Vec<_>>(),
        "candidates_total": election.candidates_total,
    })
}

/// A leader as programs see it. What it proclaims is text where it can be.
pub(crate) fn leader(leader: &Leader) -> Value {
    let mut shown = json!({
        "term": leader.term,
        "proclaimed_revision": leader.proclaimed_revision,
        "session_id": session_value(leader.session_id),
        "owner": leader.owner,
    });
    show::put_bytes(&mut shown, "key", &leader.key);
    show::put_bytes(&mut shown, "value", &leader.value);
    shown
}

fn election_rows(election: &ElectionInfo) -> Vec<Vec<String>> {
    let row = |candidate: &Contender| {
        let leader = election.leader.as_ref().filter(|_| candidate.place == 0);
        let place = match (candidate.place, leader) {
            (0, Some(_)) => "leader".to_owned(),
            (0, None) => "no leader".to_owned(),
            (place, _) => place.to_string(),
        };
        let value = leader.map(|leader| show::shown(&leader.value));
        vec![
            election.name.clone(),
            place,
            candidate.token.to_string(),
            session_hex(candidate.session_id),
            candidate.session_name.clone(),
            candidate.owner.clone(),
            duration::show(candidate.since_ms),
            value.unwrap_or_default(),
        ]
    };
    election.candidates.iter().map(row).collect()
}

fn session(session: &SessionInfo) -> Value {
    let metadata: BTreeMap<&String, &String> = session.metadata.iter().collect();
    json!({
        "session_id": session_hex(session.session_id),
        "name": session.name,
        "metadata": metadata,
        "ttl_ms": session.ttl_ms,
        "age_ms": session.age_ms,
        "opened_revision": session.opened_revision,
        "keys": session.keys,
    })
}

fn server(server: &ServerStatus) -> Value {
    let status = match &server.status {
        Ok(status) => status,
        Err(error) => {
            return json!({ "endpoint": server.endpoint, "ok": false, "error": error.to_string() });
        }
    };
    let header = status.header.unwrap_or_default();
    let member = |member: &conclave_client::Member| {
        json!({
            "member_id": hex(member.id),
            "name": member.name,
            "peer_urls": member.peer_urls,
            "client_urls": member.client_urls,
        })
    };
    json!({
        "endpoint": server.endpoint,
        "ok": true,
        "version": status.version,
        "cluster_id": hex(header.cluster_id),
        "member_id": hex(header.member_id),
        "member_name": status.member_name,
        "role": status.role,
        "leader_id": hex(header.leader_id),
        "term": header.term,
        "revision": header.revision,
        "applied_index": status.applied_index,
        "committed_index": status.committed_index,
        "log_bytes": status.log_bytes,
        "sessions": status.sessions,
        "keys": status.keys,
        "compacted_revision": status.compacted_revision,
        "state_bytes": status.state_bytes,
        "alarms": status.alarms,
        "members": status.members.iter().map(member).collect::<Vec<_>>(),
    })
}

fn server_row(server: &ServerStatus) -> Vec<String> {
    match &server.status {
        Ok(status) => {
            let header = status.header.unwrap_or_default();
            vec![
                server.endpoint.clone(),
                status.member_name.clone(),
                status.role.clone(),
                header.term.to_string(),
                status.applied_index.to_string(),
                header.revision.to_string(),
                status.sessions.to_string(),
                status.keys.to_string(),
                status.alarms.join(","),
            ]
        }
        Err(_) => vec![
            server.endpoint.clone(),
            "-".to_owned(),
            "unreachable".to_owned(),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_shown_every_byte() {
        let shown = leader(&Leader {
            key: "db/\u{fffd}".into(),
            value: b"\xff"[..].into(),
            ..Leader::default()
        });
        assert_eq!(shown["value_base64"], "/w==");
        assert_eq!(
            (&shown["value"], &shown["session_id"]),
            (&Value::Null, &Value::Null)
        );
        let shown = contender(&Contender {
            key: b"a/\xff"[..].into(),
            session_id: 31,
            ..Contender::default()
        });
        assert_eq!(shown["key_base64"], "YS//");
        assert_eq!(shown["session_id"], "1f");
    }
}
