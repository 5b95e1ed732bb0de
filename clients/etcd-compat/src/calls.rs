//! Every call of the crate once, in an order in which each can be checked.

use std::{error::Error, time::Duration};

use etcd_client::{
    AlarmAction, AlarmType, Client, CompactionOptions, Compare, CompareOp, ConnectOptions,
    DeleteOptions, EventType, GetOptions, LeaseGrantOptions, LeaseTimeToLiveOptions, LockOptions,
    MemberAddOptions, Permission, ProclaimOptions, PutOptions, ResignOptions,
    RoleRevokePermissionOptions, SortOrder, SortTarget, Txn, TxnOp, TxnOpResponse, WatchFilterType,
    WatchOptions, WatchResponse, WatchStream,
};
use tokio::time::timeout;

type Checked = Result<(), Box<dyn Error>>;

/// Nothing takes as long unless it does not end.
const PATIENCE: Duration = Duration::from_secs(20);

struct Calls {
    client: Client,
    made: Vec<&'static str>,
    /// What the server said no to, with its words.
    refused: Vec<(&'static str, String)>,
}

/// Makes all calls; those that are refused must be among `may_refuse`, and all of
/// `may_refuse` must be.
pub async fn run(endpoints: &[String], may_refuse: &[String]) -> Checked {
    let mut calls = Calls {
        client: crate::connect(endpoints).await?,
        made: Vec::new(),
        refused: Vec::new(),
    };
    timeout(PATIENCE, calls.kv()).await??;
    timeout(PATIENCE, calls.txn()).await??;
    timeout(PATIENCE, calls.watch()).await??;
    timeout(PATIENCE, calls.lease()).await??;
    timeout(PATIENCE, calls.lock()).await??;
    timeout(PATIENCE, calls.election()).await??;
    timeout(PATIENCE, calls.compact()).await??;
    timeout(PATIENCE, calls.maintenance()).await??;
    timeout(PATIENCE, calls.move_leader(endpoints)).await??;
    timeout(PATIENCE, calls.cluster()).await??;
    timeout(PATIENCE, calls.auth(endpoints)).await??;
    calls.endpoints(endpoints).await?;
    println!(
        "{} calls, {} of them refused",
        calls.made.len(),
        calls.refused.len()
    );
    for (name, words) in &calls.refused {
        println!("  {name}: {words}");
        check(
            may_refuse.iter().any(|may| may == name),
            &format!("{name} is refused: {words}"),
        )?;
    }
    for name in may_refuse {
        let refused = calls.refused.iter().any(|(refused, _)| refused == name);
        check(refused, &format!("{name} is not refused any more"))?;
    }
    Ok(())
}

fn check(holds: bool, what: &str) -> Checked {
    if holds { Ok(()) } else { Err(what.into()) }
}

/// gRPC's codes for what a server will not do, other than for what went wrong.
fn says_no(code: i32) -> bool {
    const INVALID_ARGUMENT: i32 = 3;
    const NOT_FOUND: i32 = 5;
    const FAILED_PRECONDITION: i32 = 9;
    const UNIMPLEMENTED: i32 = 12;
    [
        INVALID_ARGUMENT,
        NOT_FOUND,
        FAILED_PRECONDITION,
        UNIMPLEMENTED,
    ]
    .contains(&code)
}

async fn next(stream: &mut WatchStream) -> Result<WatchResponse, Box<dyn Error>> {
    Ok(stream.message().await?.ok_or("a watch stream has ended")?)
}

impl Calls {
    /// Notes a call; what it gave, unless the server refused it.
    fn done<T>(
        &mut self,
        name: &'static str,
        result: Result<T, etcd_client::Error>,
    ) -> Result<Option<T>, Box<dyn Error>> {
        self.made.push(name);
        match result {
            Ok(value) => Ok(Some(value)),
            Err(etcd_client::Error::GRpcStatus(status)) if says_no(status.code() as i32) => {
                self.refused.push((name, status.message().to_owned()));
                Ok(None)
            }
            Err(error) => Err(format!("{name}: {error}").into()),
        }
    }

    async fn kv(&mut self) -> Checked {
        let client = &mut self.client;
        client
            .delete("", Some(DeleteOptions::new().with_all_keys()))
            .await?;
        let put = client.put("k/1", "one", None).await?;
        let first = put.header().ok_or("no header")?.revision();
        let again = client
            .put("k/1", "two", Some(PutOptions::new().with_prev_key()))
            .await?;
        let before = again.prev_key().ok_or("no value before")?;
        check(before.value() == b"one" && before.version() == 1, "prev_kv")?;
        let ignore = PutOptions::new().with_ignore_value().with_ignore_lease();
        client.put("k/1", "", Some(ignore)).await?;
        client.put("k/2", "a", None).await?;
        client.put("k/3", "b", None).await?;
        let sorted = GetOptions::new()
            .with_prefix()
            .with_sort(SortTarget::Value, SortOrder::Descend)
            .with_limit(2);
        let got = client.get("k/", Some(sorted)).await?;
        let values: Vec<_> = got.kvs().iter().map(|kv| kv.value()).collect();
        check(values == [&b"two"[..], b"b"], "descending by value")?;
        check(got.more() && got.count() == 3, "more and count")?;
        let old = client
            .get("k/1", Some(GetOptions::new().with_revision(first)))
            .await?;
        check(old.kvs()[0].value() == b"one", "an old revision")?;
        let keys = GetOptions::new()
            .with_from_key()
            .with_keys_only()
            .with_serializable();
        let keys = client.get("k/2", Some(keys)).await?;
        check(
            keys.kvs().len() == 2 && keys.kvs()[0].value().is_empty(),
            "keys only",
        )?;
        let count = GetOptions::new().with_all_keys().with_count_only();
        let count = client.get("", Some(count)).await?;
        check(count.count() == 3 && count.kvs().is_empty(), "count only")?;
        let filtered = GetOptions::new()
            .with_range("k/9")
            .with_min_mod_revision(first + 3)
            .with_max_create_revision(first + 3);
        let filtered = client.get("k/", Some(filtered)).await?;
        check(
            filtered.kvs().len() == 1 && filtered.kvs()[0].key() == b"k/2",
            "filters",
        )?;
        let delete = DeleteOptions::new().with_range("k/3").with_prev_key();
        let deleted = client.delete("k/1", Some(delete)).await?;
        check(
            deleted.deleted() == 2 && deleted.prev_kvs().len() == 2,
            "delete",
        )?;
        self.made.extend(["put", "get", "delete"]);
        Ok(())
    }

    async fn txn(&mut self) -> Checked {
        let nested = Txn::new()
            .when([Compare::version("t/none", CompareOp::Equal, 0)])
            .and_then([TxnOp::put("t/2", "nested", None)]);
        let txn = Txn::new()
            .when([
                Compare::value("k/3", CompareOp::Equal, "b"),
                Compare::create_revision("t/1", CompareOp::Equal, 0),
                Compare::mod_revision("k/", CompareOp::Greater, 0).with_prefix(),
                Compare::lease("k/3", CompareOp::Less, 1),
            ])
            .and_then([
                TxnOp::put("t/1", "x", None),
                TxnOp::get("t/1", None),
                TxnOp::delete("k/3", None),
                TxnOp::txn(nested),
            ])
            .or_else([TxnOp::get("k/3", None)]);
        let done = self.client.txn(txn.clone()).await?;
        check(done.succeeded(), "the transaction")?;
        let answers = done.op_responses();
        check(answers.len() == 4, "an answer for each operation")?;
        let TxnOpResponse::Get(seen) = &answers[1] else {
            return Err("a get answers a get".into());
        };
        check(seen.kvs()[0].value() == b"x", "it sees its own writes")?;
        let TxnOpResponse::Txn(inner) = &answers[3] else {
            return Err("a transaction answers a transaction".into());
        };
        check(inner.succeeded(), "the nested one")?;
        let other = self.client.txn(txn).await?;
        check(
            !other.succeeded() && other.op_responses().len() == 1,
            "the other branch",
        )?;
        self.made.push("txn");
        Ok(())
    }

    async fn watch(&mut self) -> Checked {
        let put = self.client.put("w/0", "0", None).await?;
        let revision = put.header().ok_or("no header")?.revision();
        let options = WatchOptions::new()
            .with_prefix()
            .with_prev_key()
            .with_start_revision(revision)
            .with_progress_notify()
            .with_fragment();
        let mut stream = self.client.watch("w/", Some(options)).await?;
        let created = next(&mut stream).await?;
        check(created.created() && created.watch_id() == 0, "created")?;
        let past = next(&mut stream).await?;
        check(
            past.events()[0].kv().is_some_and(|kv| kv.key() == b"w/0"),
            "the past",
        )?;
        let second = WatchOptions::new()
            .with_watch_id(9)
            .with_filters([WatchFilterType::NoPut]);
        stream.watch("w/0", Some(second)).await?;
        let created = next(&mut stream).await?;
        check(created.created() && created.watch_id() == 9, "a chosen id")?;
        self.client.put("w/0", "1", None).await?;
        let event = next(&mut stream).await?;
        let before = event.events()[0].prev_kv().ok_or("no value before")?;
        check(event.watch_id() == 0 && before.value() == b"0", "prev_kv")?;
        self.client.delete("w/0", None).await?;
        let mut ids = Vec::new();
        for _ in 0..2 {
            let response = next(&mut stream).await?;
            check(
                response.events()[0].event_type() == EventType::Delete,
                "the delete",
            )?;
            ids.push(response.watch_id());
        }
        ids.sort_unstable();
        check(ids == [0, 9], "one event for each watch")?;
        stream.request_progress().await?;
        let progress = next(&mut stream).await?;
        let known = progress.header().ok_or("no header")?.revision();
        check(progress.events().is_empty() && known > revision, "progress")?;
        stream.cancel(9).await?;
        let cancelled = next(&mut stream).await?;
        check(
            cancelled.canceled() && cancelled.watch_id() == 9,
            "cancelled",
        )?;
        self.made
            .extend(["watch", "watch.cancel", "watch.request_progress"]);
        Ok(())
    }

    async fn lease(&mut self) -> Checked {
        let client = &mut self.client;
        let own = client
            .lease_grant(60, Some(LeaseGrantOptions::new().with_id(4711)))
            .await?;
        check(own.id() == 4711 && own.ttl() == 60, "a chosen id")?;
        let made = client.lease_grant(60, None).await?;
        check(made.id() > 0, "a made id")?;
        client
            .put("l/1", "", Some(PutOptions::new().with_lease(4711)))
            .await?;
        let asked = Some(LeaseTimeToLiveOptions::new().with_keys());
        let left = client.lease_time_to_live(4711, asked).await?;
        check(left.granted_ttl() == 60 && left.ttl() <= 60, "time to live")?;
        check(left.keys() == [b"l/1".to_vec()], "its keys")?;
        let all = client.leases().await?;
        let listed = |id| all.leases().iter().any(|lease| lease.id() == id);
        check(listed(4711) && listed(made.id()), "both are listed")?;
        let (mut keeper, mut answers) = client.lease_keep_alive(4711).await?;
        keeper.keep_alive().await?;
        let kept = answers.message().await?.ok_or("no answer")?;
        check(kept.id() == 4711 && kept.ttl() == 60, "kept alive")?;
        client.lease_revoke(4711).await?;
        check(
            client.get("l/1", None).await?.kvs().is_empty(),
            "its key goes",
        )?;
        keeper.keep_alive().await?;
        let gone = answers.message().await?.ok_or("no answer")?;
        check(gone.ttl() == 0, "a lease that is gone")?;
        client.lease_revoke(made.id()).await?;
        let names = [
            "lease_grant",
            "lease_revoke",
            "lease_keep_alive",
            "lease_time_to_live",
            "leases",
        ];
        self.made.extend(names);
        Ok(())
    }

    async fn lock(&mut self) -> Checked {
        for lease in [101, 102] {
            let id = Some(LeaseGrantOptions::new().with_id(lease));
            self.client.lease_grant(60, id).await?;
        }
        let with = |lease| Some(LockOptions::new().with_lease(lease));
        let first = self.client.lock("door", with(101)).await?;
        check(first.key() == b"door/65", "the key names the lease")?;
        let mut other = self.client.clone();
        let waits = tokio::spawn(async move { other.lock("door", with(102)).await });
        while self.client.get("door/66", None).await?.kvs().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        check(!waits.is_finished(), "the second one waits")?;
        self.client.unlock(first.key()).await?;
        let second = waits.await??;
        check(second.key() == b"door/66", "then it holds")?;
        self.client.unlock(second.key()).await?;
        let anonymous = self.client.lock("door", None).await?;
        self.client.unlock(anonymous.key()).await?;
        for lease in [101, 102] {
            self.client.lease_revoke(lease).await?;
        }
        self.made.extend(["lock", "unlock"]);
        Ok(())
    }

    async fn election(&mut self) -> Checked {
        for lease in [201, 202] {
            let id = Some(LeaseGrantOptions::new().with_id(lease));
            self.client.lease_grant(60, id).await?;
        }
        let won = self.client.campaign("chair", "a", 201).await?;
        let key = won.leader().ok_or("no leader key")?.clone();
        check(
            key.key() == b"chair/c9" && key.lease() == 201,
            "the leader's key",
        )?;
        let mut observed = self.client.observe("chair").await?;
        let seen = observed.message().await?.ok_or("nothing observed")?;
        check(
            seen.kv().is_some_and(|kv| kv.value() == b"a"),
            "the observed one",
        )?;
        let options = ProclaimOptions::new().with_leader(key.clone());
        self.client.proclaim("b", Some(options)).await?;
        let leader = self.client.leader("chair").await?;
        check(
            leader.kv().is_some_and(|kv| kv.value() == b"b"),
            "what it proclaimed",
        )?;
        let mut other = self.client.clone();
        let waits = tokio::spawn(async move { other.campaign("chair", "c", 202).await });
        while self.client.get("chair/ca", None).await?.kvs().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let options = ResignOptions::new().with_leader(key);
        self.client.resign(Some(options)).await?;
        let next = waits.await??.leader().ok_or("no leader key")?.clone();
        check(next.key() == b"chair/ca", "the next one leads")?;
        loop {
            let seen = observed
                .message()
                .await?
                .ok_or("the observer's stream has ended")?;
            if seen.kv().is_some_and(|kv| kv.value() == b"c") {
                break;
            }
        }
        self.client
            .resign(Some(ResignOptions::new().with_leader(next)))
            .await?;
        for lease in [201, 202] {
            self.client.lease_revoke(lease).await?;
        }
        self.made
            .extend(["campaign", "proclaim", "leader", "observe", "resign"]);
        Ok(())
    }

    async fn compact(&mut self) -> Checked {
        let put = self.client.put("c", "1", None).await?;
        let revision = put.header().ok_or("no header")?.revision();
        let options = CompactionOptions::new().with_physical();
        self.client.compact(revision, Some(options)).await?;
        let old = GetOptions::new().with_revision(revision - 1);
        let refused = self.client.get("c", Some(old)).await;
        let words = format!("{:?}", refused.err());
        check(
            words.contains("etcdserver: mvcc: required revision has been compacted"),
            &words,
        )?;
        let old = WatchOptions::new().with_start_revision(1).with_prefix();
        let mut stream = self.client.watch("c", Some(old)).await?;
        let mut response = next(&mut stream).await?;
        while !response.canceled() {
            response = next(&mut stream).await?;
        }
        check(
            response.compact_revision() == revision,
            "a watch tells the compacted revision",
        )?;
        self.made.push("compact");
        Ok(())
    }

    async fn maintenance(&mut self) -> Checked {
        let status = self.client.status().await;
        if let Some(status) = self.done("status", status)? {
            check(
                status.leader() != 0 && !status.version().is_empty(),
                "status",
            )?;
        }
        let alarms = self
            .client
            .alarm(AlarmAction::Get, AlarmType::None, None)
            .await;
        if let Some(alarms) = self.done("alarm", alarms)? {
            check(alarms.alarms().is_empty(), "no alarm")?;
        }
        let hash = self.client.hash().await;
        self.done("hash", hash)?;
        let hash = self.client.hash_kv(0).await;
        if let Some(hash) = self.done("hash_kv", hash)? {
            check(hash.compact_version() > 0, "the compacted revision")?;
        }
        let defragmented = self.client.defragment().await;
        self.done("defragment", defragmented)?;
        let snapshot = self.client.snapshot().await;
        if let Some(mut stream) = self.done("snapshot", snapshot)? {
            let mut bytes = 0;
            while let Some(part) = stream.message().await? {
                bytes += part.blob().len();
            }
            check(bytes > 0, "a snapshot has something in it")?;
        }
        Ok(())
    }

    /// To another member if there is one, asked of the one that leads.
    async fn move_leader(&mut self, endpoints: &[String]) -> Checked {
        let members = self.client.member_list().await?;
        let leader = self.client.status().await?.leader();
        let other = members.members().iter().map(|member| member.id());
        let target = other.clone().find(|id| *id != leader).unwrap_or(leader);
        for endpoint in endpoints {
            let mut one = Client::connect([endpoint], None).await?;
            let status = one.status().await?;
            let own = status.header().ok_or("no header")?.member_id();
            if own == leader {
                let moved = one.move_leader(target).await;
                self.done("move_leader", moved)?;
            }
        }
        Ok(())
    }

    async fn cluster(&mut self) -> Checked {
        let listed = self.client.member_list().await?;
        check(!listed.members().is_empty(), "members")?;
        let member = listed.members()[0].clone();
        check(
            !member.client_urls().is_empty() && !member.name().is_empty(),
            "a member",
        )?;
        self.made.push("member_list");
        let learner = Some(MemberAddOptions::new().with_is_learner());
        let added = self
            .client
            .member_add(["http://127.0.0.1:1"], learner)
            .await;
        let added = self.done("member_add", added)?;
        let id = added.and_then(|added| added.member().map(|member| member.id()));
        let updated = self
            .client
            .member_update(id.unwrap_or(1), [String::from("http://127.0.0.1:2")])
            .await;
        self.done("member_update", updated)?;
        // No server of it runs: nobody may promote it.
        let promoted = self.client.member_promote(id.unwrap_or(1)).await;
        check(promoted.is_err(), "a member that is not there is promoted")?;
        self.made.push("member_promote");
        let removed = self.client.member_remove(id.unwrap_or(1)).await;
        self.done("member_remove", removed)?;
        Ok(())
    }

    async fn auth(&mut self, endpoints: &[String]) -> Checked {
        let result = self.client.user_add("root", "secret", None).await;
        self.done("user_add", result)?;
        let result = self.client.user_grant_role("root", "root").await;
        self.done("user_grant_role", result)?;
        let result = self.client.role_add("reader").await;
        self.done("role_add", result)?;
        let permission = Permission::read("a").with_prefix();
        let result = self
            .client
            .role_grant_permission("reader", permission)
            .await;
        self.done("role_grant_permission", result)?;
        let result = self.client.role_get("reader").await;
        if let Some(role) = self.done("role_get", result)? {
            check(role.permissions().len() == 1, "one permission")?;
        }
        let result = self.client.role_list().await;
        self.done("role_list", result)?;
        let result = self.client.user_list().await;
        self.done("user_list", result)?;
        let result = self.client.user_get("root").await;
        self.done("user_get", result)?;
        let result = self.client.user_change_password("root", "new").await;
        self.done("user_change_password", result)?;
        let result = self.client.auth_enable().await;
        if self.done("auth_enable", result)?.is_some() {
            let user = ConnectOptions::new().with_user("root", "new");
            let mut root = Client::connect(endpoints, Some(user)).await?;
            root.get("a", None).await?;
            let result = root.auth_disable().await;
            self.done("auth_disable", result)?;
        } else {
            let result = self.client.auth_disable().await;
            self.done("auth_disable", result)?;
        }
        let end = RoleRevokePermissionOptions::new().with_prefix();
        let result = self
            .client
            .role_revoke_permission("reader", "a", Some(end))
            .await;
        self.done("role_revoke_permission", result)?;
        let result = self.client.user_revoke_role("root", "root").await;
        self.done("user_revoke_role", result)?;
        let result = self.client.role_delete("reader").await;
        self.done("role_delete", result)?;
        let result = self.client.user_delete("root").await;
        self.done("user_delete", result)?;
        Ok(())
    }

    async fn endpoints(&mut self, endpoints: &[String]) -> Checked {
        let required = ConnectOptions::new()
            .with_require_leader(true)
            .with_keep_alive(Duration::from_secs(10), Duration::from_secs(10))
            .with_timeout(PATIENCE);
        let mut client = Client::connect(&endpoints[..1], Some(required)).await?;
        for endpoint in endpoints {
            client.add_endpoint(endpoint).await?;
        }
        client.get("a", None).await?;
        self.made.extend(["require leader", "add_endpoint"]);
        Ok(())
    }
}
