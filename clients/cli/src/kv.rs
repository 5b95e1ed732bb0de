//! `conclave kv`: keys and values.

pub(crate) mod args;
pub(crate) mod show;
mod txn;

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _, Read as _},
    os::unix::ffi::OsStringExt as _,
    pin::pin,
};

use conclave_client::{
    Client, Delete, Deleted, Error, Found, Get, KeyRange, KeyValue, OpResult, Put, SortBy, TxnDone,
    Watch, Written,
};
use serde_json::{Value, json};

use self::{
    args::{
        CompactKvArgs, DelArgs, GetArgs, Keys, KvArgs, KvCommand, PutArgs, Sort, TxnArgs, Watched,
    },
    txn::bytes_of,
};
use crate::{
    admin::connect,
    cli::Global,
    failure::{Failure, GENERAL},
    output::{self, Format},
};

/// Runs one of the commands.
pub(crate) async fn run(args: KvArgs, global: Global) -> Result<u8, Failure> {
    let client = connect(&global)?;
    match args.what {
        KvCommand::Put(args) => put(&client, args, global.output).await,
        KvCommand::Get(args) => get(&client, args, global.output).await,
        KvCommand::Del(args) => del(&client, args, global.output).await,
        KvCommand::Txn(args) => txn(&client, args, global.output).await,
        KvCommand::Watch(args) => watch(&client, args.watched, global.output).await,
        KvCommand::Compact(args) => compact(&client, args, global.output).await,
    }
}

async fn put(client: &Client, args: PutArgs, format: Format) -> Result<u8, Failure> {
    let value = match &args.value {
        _ if args.keep_value => Vec::new(),
        Some(value) if value != "-" => bytes_of(value),
        _ => stdin()?,
    };
    let written = client.kv().put(put_of(args, value)).await?;
    match format {
        Format::Json => output::json(&written_json(&written))?,
        Format::Table => {
            output::text(&format!("revision {}\n", written.revision))?;
            table_if_any(written.previous.as_slice())?;
        }
    }
    Ok(0)
}

async fn get(client: &Client, args: GetArgs, format: Format) -> Result<u8, Failure> {
    let found = client.kv().get(get_of(&args)).await?;
    match format {
        Format::Json => output::json(&found_json(&found, !args.keys_only))?,
        Format::Table if args.count_only => output::text(&format!("{}\n", found.count))?,
        Format::Table if args.value_only => output::bytes(&values(&found))?,
        Format::Table if args.keys_only => {
            let keys = found.kvs.iter().map(|kv| show::shown(&kv.key) + "\n");
            output::text(&keys.collect::<String>())?;
        }
        Format::Table => {
            table_if_any(&found.kvs)?;
            if found.more {
                output::complain(&format!("{} of {} keys", found.kvs.len(), found.count));
            }
        }
    }
    let is_single = args.keys.end.is_none() && !args.keys.prefix && !args.keys.from;
    if is_single && found.count == 0 && !args.count_only {
        let key = show::shown(&bytes_of(&args.keys.key));
        return Err(Failure::new(GENERAL, format!("there is no key `{key}`")));
    }
    Ok(0)
}

async fn del(client: &Client, args: DelArgs, format: Format) -> Result<u8, Failure> {
    let deleted = client.kv().delete(delete_of(&args)).await?;
    match format {
        Format::Json => output::json(&deleted_json(&deleted))?,
        Format::Table => {
            output::text(&format!("{} deleted\n", deleted.deleted))?;
            table_if_any(&deleted.previous)?;
        }
    }
    Ok(0)
}

async fn txn(client: &Client, args: TxnArgs, format: Format) -> Result<u8, Failure> {
    let is_on_the_line = [&args.conditions, &args.then, &args.otherwise]
        .iter()
        .any(|texts| !texts.is_empty());
    let txn = match is_on_the_line {
        true => txn::of_args(&args)?,
        false => txn::of_text(&stdin()?)?,
    };
    let done = client.kv().txn(txn).await?;
    match format {
        Format::Json => output::json(&txn_json(&done))?,
        Format::Table => {
            let verdict = match done.succeeded {
                true => "the conditions held",
                false => "the conditions did not hold",
            };
            output::text(&format!("{verdict}, revision {}\n", done.revision))?;
            for result in &done.results {
                show_result(result)?;
            }
        }
    }
    Ok(0)
}

async fn watch(client: &Client, watched: Watched, format: Format) -> Result<u8, Failure> {
    let mut watching = client.watch(watch_of(&watched)).await?;
    let mut left = watched.events.unwrap_or(u64::MAX);
    let mut unread = pin!(output::unread());
    while left > 0 {
        let events = tokio::select! {
            events = watching.next() => events.map_err(gone)?,
            () = &mut unread => return Ok(0),
        };
        for event in events {
            match format {
                Format::Json => output::json(&show::event(&event))?,
                Format::Table => output::text(&show::event_line(&event))?,
            }
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    Ok(0)
}

async fn compact(client: &Client, args: CompactKvArgs, format: Format) -> Result<u8, Failure> {
    let CompactKvArgs { revision, physical } = args;
    client.kv().compact(revision, physical).await?;
    match format {
        Format::Json => output::json(&json!({ "compacted_revision": revision }))?,
        Format::Table => output::text(&format!("history begins with revision {revision} now\n"))?,
    }
    Ok(0)
}

/// What people are told when a watch ends, beside what the error says.
pub(crate) fn gone(error: Error) -> Failure {
    let failure = Failure::from(error.clone());
    match error {
        Error::Compacted { compacted } if compacted > 0 => Failure::new(
            failure.code,
            format!("changes were missed: {error}, or watch with --rev {compacted}"),
        ),
        _ => failure,
    }
}

pub(crate) fn range_of(keys: &Keys) -> KeyRange {
    let key = bytes_of(&keys.key);
    match &keys.end {
        Some(end) => KeyRange::between(key, bytes_of(end)),
        None if keys.prefix => KeyRange::prefix(key),
        None if keys.from => KeyRange::starting_at(key),
        None => KeyRange::key(key),
    }
}

pub(crate) fn watch_of(watched: &Watched) -> Watch {
    let mut watch = Watch::new(range_of(&watched.keys));
    if let Some(revision) = watched.rev {
        watch = watch.from_revision(revision);
    }
    if watched.prev {
        watch = watch.previous();
    }
    match (watched.puts_only, watched.deletes_only) {
        (true, _) => watch.no_deletes(),
        (_, true) => watch.no_puts(),
        _ => watch,
    }
}

fn put_of(args: PutArgs, value: Vec<u8>) -> Put {
    let mut put = Put::new(OsString::into_vec(args.key), value);
    if let Some(id) = args.lease {
        put = put.lease(id);
    }
    if args.keep_lease {
        put = put.keep_lease();
    }
    if args.keep_value {
        put = put.keep_value();
    }
    match args.prev {
        true => put.previous(),
        false => put,
    }
}

fn get_of(args: &GetArgs) -> Get {
    let mut get = Get::new(range_of(&args.keys)).limit(args.limit);
    if let Some(revision) = args.rev {
        get = get.at_revision(revision);
    }
    let by = args.sort.map(|sort| match sort {
        Sort::Key => SortBy::Key,
        Sort::Version => SortBy::Version,
        Sort::Create => SortBy::CreateRevision,
        Sort::Mod => SortBy::ModRevision,
        Sort::Value => SortBy::Value,
    });
    get = match (by, args.descend) {
        (by, true) => get.descending(by.unwrap_or(SortBy::Key)),
        (Some(by), false) => get.ascending(by),
        (None, false) => get,
    };
    if args.keys_only {
        get = get.keys_only();
    }
    if args.count_only {
        get = get.count_only();
    }
    match args.serializable {
        true => get.serializable(),
        false => get,
    }
}

fn delete_of(args: &DelArgs) -> Delete {
    let delete = Delete::new(range_of(&args.keys));
    match args.prev {
        true => delete.previous(),
        false => delete,
    }
}

/// All of stdin. What is too long for the servers is refused by them.
fn stdin() -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    io::stdin().lock().read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The values byte for byte; so that a prompt has its own line, a terminal gets a
/// newline at the end.
fn values(found: &Found) -> Vec<u8> {
    let values: Vec<&[u8]> = found.kvs.iter().map(|kv| &kv.value[..]).collect();
    let mut bytes = values.join(&b'\n');
    if !values.is_empty() && io::stdout().is_terminal() {
        bytes.push(b'\n');
    }
    bytes
}

fn table_if_any(kvs: &[KeyValue]) -> Result<(), Failure> {
    if !kvs.is_empty() {
        let rows: Vec<Vec<String>> = kvs.iter().map(show::row).collect();
        output::table(&show::TITLES, &rows)?;
    }
    Ok(())
}

fn show_result(result: &OpResult) -> Result<(), Failure> {
    match result {
        OpResult::Found(found) if found.kvs.is_empty() => {
            output::text(&format!("get: {} keys\n", found.count))?;
        }
        OpResult::Found(found) => table_if_any(&found.kvs)?,
        OpResult::Written(written) => {
            output::text("put: done\n")?;
            table_if_any(written.previous.as_slice())?;
        }
        OpResult::Deleted(deleted) => {
            output::text(&format!("del: {} deleted\n", deleted.deleted))?;
            table_if_any(&deleted.previous)?;
        }
        OpResult::Txn(done) => done.results.iter().try_for_each(show_result)?,
    }
    Ok(())
}

fn found_json(found: &Found, with_values: bool) -> Value {
    let kvs = found.kvs.iter().map(|kv| show::key_value(kv, with_values));
    json!({
        "revision": found.revision,
        "count": found.count,
        "more": found.more,
        "kvs": kvs.collect::<Vec<_>>(),
    })
}

fn written_json(written: &Written) -> Value {
    let previous = written.previous.as_ref();
    json!({
        "revision": written.revision,
        "previous": previous.map(|kv| show::key_value(kv, true)),
    })
}

fn deleted_json(deleted: &Deleted) -> Value {
    let previous = deleted.previous.iter().map(|kv| show::key_value(kv, true));
    json!({
        "revision": deleted.revision,
        "deleted": deleted.deleted,
        "previous": previous.collect::<Vec<_>>(),
    })
}

fn txn_json(done: &TxnDone) -> Value {
    let result = |result: &OpResult| match result {
        OpResult::Found(found) => json!({ "get": found_json(found, true) }),
        OpResult::Written(written) => json!({ "put": written_json(written) }),
        OpResult::Deleted(deleted) => json!({ "del": deleted_json(deleted) }),
        OpResult::Txn(done) => json!({ "txn": txn_json(done) }),
    };
    json!({
        "revision": done.revision,
        "succeeded": done.succeeded,
        "results": done.results.iter().map(result).collect::<Vec<_>>(),
    })
}
