//! One of the two servers of a case: requests go to it, answers come back in the
//! case's own names.

use std::fmt::Debug;

use bytes::Bytes;
use conclave_proto::etcd::etcdserverpb::{
    AlarmRequest, AuthStatusRequest, CompactionRequest, DeleteRangeRequest, HashKvRequest,
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseLeasesRequest, LeaseRevokeRequest,
    LeaseTimeToLiveRequest, MemberListRequest, PutRequest, RangeRequest, StatusRequest,
    WatchCreateRequest, WatchResponse, auth_client::AuthClient, cluster_client::ClusterClient,
    kv_client::KvClient, lease_client::LeaseClient, maintenance_client::MaintenanceClient,
};
use tokio_stream::StreamExt as _;
use tonic::{Response, Status, transport::Channel};

use crate::{
    contending::Contending,
    names::{Names, Shown},
    step::{Step, terse},
    watching::{FENCE_KEY, Watching},
};

/// What a request led to: an answer or a status, in the case's names.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer(pub String);

pub struct Side {
    pub channel: Channel,
    pub names: Names,
    /// Changes every request before it is sent: a server that behaves otherwise.
    pub plant: Option<fn(&mut Step)>,
    pub streams: [Option<Watching>; 2],
    pub contending: Contending,
}

/// An answer, or the status in its place, as it is compared.
pub fn answer<T: Shown + Debug>(result: Result<Response<T>, Status>, names: &Names) -> Answer {
    match result {
        Ok(response) => {
            let mut response = response.into_inner();
            response.shown(names);
            Answer(terse(&format!("{response:?}")))
        }
        Err(status) => refused(&status),
    }
}

pub fn refused(status: &Status) -> Answer {
    let (code, text) = (status.code(), status.message());
    assert!(
        code != tonic::Code::Unavailable && !text.contains("transport error"),
        "a server is gone: {status:?}"
    );
    Answer(format!("{code:?}: {text}"))
}

impl Side {
    pub fn new(channel: Channel) -> Self {
        Self {
            contending: Contending::new(channel.clone()),
            channel,
            names: Names::default(),
            plant: None,
            streams: [None, None],
        }
    }

    pub fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX)
    }

    fn lease(&self) -> LeaseClient<Channel> {
        LeaseClient::new(self.channel.clone())
    }

    fn maintenance(&self) -> MaintenanceClient<Channel> {
        MaintenanceClient::new(self.channel.clone())
    }

    /// Puts the fence's key; the revision of that.
    async fn fence(&self) -> i64 {
        let put = PutRequest {
            key: Bytes::from_static(FENCE_KEY),
            ..PutRequest::default()
        };
        let response = self.kv().put(put).await.unwrap().into_inner();
        response.header.unwrap().revision
    }

    /// A server as each case finds it: no key but the fence's, and history compacted
    /// up to now.
    pub async fn begin(&mut self) {
        self.delete_all().await;
        // Of the newest revision is a key that lives: nobody forgets that.
        let revision = self.fence().await;
        let compact = CompactionRequest {
            revision,
            physical: false,
        };
        self.kv().compact(compact).await.unwrap();
        self.names = Names {
            beginning: revision,
            ..Names::default()
        };
    }

    async fn delete_all(&self) -> i64 {
        let all = DeleteRangeRequest {
            key: Bytes::from_static(b"\0"),
            range_end: Bytes::from_static(b"\0"),
            prev_kv: false,
        };
        let response = self.kv().delete_range(all).await.unwrap().into_inner();
        response.header.unwrap().revision
    }

    /// Ends what the case has begun: waits for calls that nothing holds up any more,
    /// revokes leases.
    pub async fn end(&mut self) {
        self.streams = [None, None];
        while !self.contending.ended() {
            self.delete_all().await;
            self.contending.settle(&mut self.names).await;
        }
        self.contending = Contending::new(self.channel.clone());
        let leases = self.lease().lease_leases(LeaseLeasesRequest {}).await;
        let leases = leases.map(|leases| leases.into_inner().leases);
        for lease in leases.unwrap_or_default() {
            let revoke = LeaseRevokeRequest { id: lease.id };
            self.lease().lease_revoke(revoke).await.unwrap();
        }
    }

    /// Waits until each stream has every event of the steps so far, unless its watch
    /// is still catching up.
    pub async fn fenced(&self) {
        if self.streams.iter().all(Option::is_none) {
            return;
        }
        let revision = self.fence().await;
        for stream in self.streams.iter().flatten() {
            stream.fenced(revision).await;
        }
    }

    /// Whether a watch was created with a revision to start from.
    pub fn may_be_parked(&self) -> bool {
        self.streams.iter().flatten().any(Watching::has_a_past)
    }

    /// What has come on the streams.
    pub fn arrived(&self) -> Vec<String> {
        let mut all = Vec::new();
        for (number, stream) in self.streams.iter().enumerate() {
            let Some(stream) = stream else { continue };
            let shown = stream.with(|arrived| arrived.shown(&self.names));
            all.extend(shown.iter().map(|line| format!("stream {number}, {line}")));
        }
        all
    }

    /// Sends a request, and says what came of it; also what other calls it ended.
    pub async fn perform(&mut self, step: &Step) -> Answer {
        let mut step = step.clone();
        if let Some(plant) = self.plant {
            plant(&mut step);
        }
        let mut answer = self.send(step).await;
        for ended in self.contending.settle(&mut self.names).await {
            answer.0 += &format!("\n      and {ended}");
        }
        answer
    }

    async fn send(&mut self, step: Step) -> Answer {
        match step {
            Step::Range(mut range) => {
                self.names.range(&mut range);
                answer(self.kv().range(range).await, &self.names)
            }
            Step::Put(mut put) => {
                put.lease = self.names.lease(put.lease);
                answer(self.kv().put(put).await, &self.names)
            }
            Step::Delete(delete) => answer(self.kv().delete_range(delete).await, &self.names),
            Step::Txn(mut txn) => {
                self.names.txn(&mut txn);
                answer(self.kv().txn(txn).await, &self.names)
            }
            Step::Compact(mut compact) => {
                compact.revision = self.names.revision(compact.revision);
                answer(self.kv().compact(compact).await, &self.names)
            }
            Step::Grant { lease, id, ttl } => self.grant(lease, id, ttl).await,
            Step::Revoke { lease } => {
                let id = self.names.lease(lease);
                let revoke = LeaseRevokeRequest { id };
                answer(self.lease().lease_revoke(revoke).await, &self.names)
            }
            Step::KeepAlive { leases } => self.keep_alive(&leases).await,
            Step::TimeToLive { lease, keys } => {
                let id = self.names.lease(lease);
                let asked = LeaseTimeToLiveRequest { id, keys };
                answer(self.lease().lease_time_to_live(asked).await, &self.names)
            }
            Step::Leases => {
                let leases = self.lease().lease_leases(LeaseLeasesRequest {}).await;
                answer(leases, &self.names)
            }
            Step::Watch { stream, create } => self.watch(stream, create).await,
            Step::Cancel { stream, id } => {
                let answer = match &self.streams[stream] {
                    Some(stream) => stream.cancel(id).await,
                    None => None,
                };
                self.told(answer)
            }
            Step::Progress { stream } => {
                let answer = match &self.streams[stream] {
                    // Newer ones say nothing before a watch of the future has begun.
                    Some(stream) if stream.begins_later() => None,
                    Some(stream) => stream.progress().await,
                    None => None,
                };
                self.told(answer)
            }
            step => self.contend_or_ask(step).await,
        }
    }

    async fn contend_or_ask(&mut self, step: Step) -> Answer {
        match step {
            Step::HashKv { revision } => {
                let revision = self.names.revision(revision);
                let hash = self.maintenance().hash_kv(HashKvRequest { revision }).await;
                answer(hash, &self.names)
            }
            Step::Alarms => {
                let alarms = self.maintenance().alarm(AlarmRequest::default()).await;
                answer(alarms, &self.names)
            }
            Step::Members => {
                let mut client = ClusterClient::new(self.channel.clone());
                let request = MemberListRequest { linearizable: true };
                answer(client.member_list(request).await, &self.names)
            }
            Step::Status => {
                let status = self.maintenance().status(StatusRequest {}).await;
                answer(status, &self.names)
            }
            Step::AuthStatus => {
                let mut client = AuthClient::new(self.channel.clone());
                answer(client.auth_status(AuthStatusRequest {}).await, &self.names)
            }
            step => self.contending.perform(step, &mut self.names).await,
        }
    }

    async fn grant(&mut self, lease: i64, id: i64, ttl: i64) -> Answer {
        let grant = LeaseGrantRequest { id, ttl };
        let result = self.lease().lease_grant(grant).await;
        let made = result.as_ref().map_or(id, |response| response.get_ref().id);
        if made != 0 {
            self.names.leases.insert(lease, made);
        }
        answer(result, &self.names)
    }

    async fn keep_alive(&self, leases: &[i64]) -> Answer {
        let requests: Vec<_> = leases
            .iter()
            .map(|lease| LeaseKeepAliveRequest {
                id: self.names.lease(*lease),
            })
            .collect();
        let requests = tokio_stream::iter(requests);
        let mut stream = match self.lease().lease_keep_alive(requests).await {
            Ok(response) => response.into_inner(),
            Err(status) => return refused(&status),
        };
        let mut answers = Vec::new();
        while let Some(message) = stream.next().await {
            answers.push(answer(message.map(Response::new), &self.names).0);
        }
        Answer(answers.join("; "))
    }

    async fn watch(&mut self, stream: usize, mut create: WatchCreateRequest) -> Answer {
        if self.streams[stream].is_none() {
            let opened = Watching::open(self.channel.clone()).await;
            self.streams[stream] = Some(opened);
        }
        create.start_revision = self.names.revision(create.start_revision);
        let stream = self.streams[stream].as_ref().unwrap();
        let answer = stream.create(create).await;
        self.told(answer)
    }

    fn told(&self, response: Option<WatchResponse>) -> Answer {
        let Some(mut response) = response else {
            return Answer("no answer".to_owned());
        };
        response.shown(&self.names);
        Answer(terse(&format!("{response:?}")))
    }

    /// The keys of a contest, oldest first.
    pub async fn contenders(channel: &Channel, name: &[u8]) -> Vec<Bytes> {
        let prefix = [name, b"/"].concat();
        let end = [name, b"0"].concat();
        let range = RangeRequest {
            key: prefix.into(),
            range_end: end.into(),
            sort_target: 2,
            sort_order: 1,
            ..RangeRequest::default()
        };
        let response = KvClient::new(channel.clone()).range(range).await.unwrap();
        let kvs = response.into_inner().kvs;
        kvs.into_iter().map(|kv| kv.key).collect()
    }
}
