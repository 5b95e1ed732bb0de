//! `conclave lease`: leases by their ids.

use std::{pin::pin, time::Duration};

use conclave_client::{Error, Status};
use serde_json::{Value, json};

use crate::{
    admin::connect,
    cli::Global,
    duration,
    failure::{Failure, GENERAL, LOST},
    kv::{
        args::{LeaseArgs, LeaseCommand},
        show,
    },
    output::{self, Format, session_hex},
};

/// Runs one of the commands.
pub(crate) async fn run(args: LeaseArgs, global: Global) -> Result<u8, Failure> {
    let leases = connect(&global)?.leases();
    match args.what {
        LeaseCommand::Grant(args) => {
            let (id, ttl) = leases.grant(args.ttl, args.id.unwrap_or(0)).await?;
            show_lease(id, ttl, global.output)?;
        }
        LeaseCommand::Revoke(args) => {
            leases.revoke(args.id).await?;
            match global.output {
                Format::Json => output::json(&json!({ "revoked": session_hex(args.id) }))?,
                Format::Table => output::text("revoked\n")?,
            }
        }
        LeaseCommand::KeepAlive(args) if args.once => {
            let ttl = leases.renew(args.lease.id).await?;
            show_lease(args.lease.id, ttl, global.output)?;
        }
        LeaseCommand::KeepAlive(args) => {
            let lease = leases.keep(args.lease.id).await?;
            show_lease(lease.id(), lease.ttl(), global.output)?;
            return keep(lease, global.output).await;
        }
        LeaseCommand::Ttl(args) => {
            let info = leases.info(args.lease.id, args.keys).await?;
            let info = info.ok_or(Error::LeaseNotFound)?;
            match global.output {
                Format::Json => output::json(&info_json(&info, args.keys))?,
                Format::Table => {
                    let (left, ttl) = (shown(info.left), shown(info.ttl));
                    output::text(&format!("{left} left of {ttl}\n"))?;
                    let keys = info.keys.iter().map(|key| show::shown(key) + "\n");
                    output::text(&keys.collect::<String>())?;
                }
            }
        }
        LeaseCommand::List => {
            let ids = leases.list().await?;
            match global.output {
                Format::Json => {
                    let ids = ids.iter().map(|id| json!({ "lease_id": session_hex(*id) }));
                    output::json(&json!({ "leases": ids.collect::<Vec<Value>>() }))?;
                }
                Format::Table => {
                    let ids: Vec<Vec<String>> =
                        ids.iter().map(|id| vec![session_hex(*id)]).collect();
                    output::table(&["LEASE"], &ids)?;
                }
            }
        }
    }
    Ok(0)
}

/// Tells how the lease stands until it is lost, or nobody listens.
async fn keep(lease: conclave_client::Lease, format: Format) -> Result<u8, Failure> {
    let mut changes = lease.changes();
    let mut unread = pin!(output::unread());
    loop {
        let status = changes.borrow_and_update().clone();
        let word = match &status {
            Status::Active => "active",
            Status::Suspect { .. } => "suspect",
            Status::Lost(_) => "lost",
        };
        match format {
            Format::Json => output::json(&json!({
                "status": word,
                "left_ms": millis(lease.remaining()),
            }))?,
            Format::Table => output::text(&format!("{word}\n"))?,
        }
        if let Status::Lost(reason) = status {
            let id = session_hex(lease.id());
            return Err(Failure::new(LOST, format!("lease {id} lost: {reason}")));
        }
        tokio::select! {
            changed = changes.changed() => changed.map_err(|_| {
                Failure::new(GENERAL, "nothing renews the lease any more")
            })?,
            () = &mut unread => return Ok(0),
        }
    }
}

fn show_lease(id: i64, ttl: Duration, format: Format) -> Result<(), Failure> {
    match format {
        Format::Json => output::json(&json!({
            "lease_id": session_hex(id),
            "ttl_ms": millis(ttl),
        }))?,
        Format::Table => output::text(&format!(
            "lease  {}\nttl    {}\n",
            session_hex(id),
            shown(ttl)
        ))?,
    }
    Ok(())
}

fn info_json(info: &conclave_client::LeaseInfo, with_keys: bool) -> Value {
    let mut shown = json!({
        "lease_id": session_hex(info.id),
        "left_ms": millis(info.left),
        "ttl_ms": millis(info.ttl),
    });
    if with_keys {
        let key = |key: &conclave_client::Bytes| {
            let mut object = json!({});
            show::put_bytes(&mut object, "key", key);
            object
        };
        shown["keys"] = info.keys.iter().map(key).collect();
    }
    shown
}

fn shown(time: Duration) -> String {
    duration::show(millis(time))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
