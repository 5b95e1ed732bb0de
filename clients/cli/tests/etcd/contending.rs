//! Calls of a case that may wait for others: locks and campaigns.
//!
//! Whether a call waits is not a matter of time: its key is there, and another one is
//! older. A call whose key is the oldest ends, and the case waits for that.

use std::collections::BTreeMap;

use bytes::Bytes;
use conclave_proto::etcd::{
    v3electionpb::{
        CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, ProclaimRequest,
        ResignRequest, election_client::ElectionClient,
    },
    v3lockpb::{LockRequest, LockResponse, UnlockRequest, lock_client::LockClient},
};
use tokio::task::JoinHandle;
use tonic::{Response, Status, transport::Channel};

use crate::{
    names::Names,
    side::{Answer, Side, answer, refused},
    soon,
    step::Step,
};

type Contest = (Bytes, i64);

pub struct Contending {
    channel: Channel,
    calls: Vec<Call>,
    /// The keys of locks that were granted, and of campaigns that were won.
    locked: BTreeMap<Contest, Bytes>,
    won: BTreeMap<Contest, LeaderKey>,
}

struct Call {
    number: usize,
    contest: Contest,
    /// Its place; none if it ended at once.
    key: Option<Bytes>,
    running: Option<JoinHandle<Ended>>,
}

enum Ended {
    Lock(Result<Response<LockResponse>, Status>),
    Campaign(Result<Response<CampaignResponse>, Status>),
}

impl Contending {
    pub fn new(channel: Channel) -> Self {
        Self {
            channel,
            calls: Vec::new(),
            locked: BTreeMap::new(),
            won: BTreeMap::new(),
        }
    }

    fn lock(&self) -> LockClient<Channel> {
        LockClient::new(self.channel.clone())
    }

    fn election(&self) -> ElectionClient<Channel> {
        ElectionClient::new(self.channel.clone())
    }

    /// Whether a call for this waits.
    pub fn waits(&self, name: &Bytes, lease: i64) -> bool {
        let is_for = |call: &&Call| call.contest.0 == *name && call.contest.1 == lease;
        self.calls
            .iter()
            .filter(is_for)
            .any(|call| call.running.is_some())
    }

    /// Whether there may be a contender.
    pub fn has_any(&self) -> bool {
        !self.calls.is_empty()
    }

    /// Whether no call waits.
    pub fn ended(&self) -> bool {
        self.calls.iter().all(|call| call.running.is_none())
    }

    pub async fn perform(&mut self, step: Step, names: &mut Names) -> Answer {
        match step {
            Step::Lock { name, lease } => {
                let request = LockRequest {
                    name: name.clone(),
                    lease: names.lease(lease),
                };
                let mut client = self.lock();
                let call = async move { Ended::Lock(client.lock(request).await) };
                self.begin((name, lease), names, call).await
            }
            Step::Unlock { name, lease } => {
                let locked = self.locked.get(&(name.clone(), lease)).cloned();
                let key = locked.unwrap_or_else(|| match lease {
                    0 => Bytes::new(),
                    _ => names.contender(&name, lease),
                });
                answer(self.lock().unlock(UnlockRequest { key }).await, names)
            }
            Step::Campaign { name, lease, value } => {
                let request = CampaignRequest {
                    name: name.clone(),
                    lease: names.lease(lease),
                    value,
                };
                let mut client = self.election();
                let call = async move { Ended::Campaign(client.campaign(request).await) };
                self.begin((name, lease), names, call).await
            }
            Step::Proclaim {
                name,
                lease,
                later,
                value,
            } => {
                let leader = self.leader_key(name, lease, later, names);
                let request = ProclaimRequest { leader, value };
                answer(self.election().proclaim(request).await, names)
            }
            Step::Resign { name, lease, later } => {
                let leader = self.leader_key(name, lease, later, names);
                answer(
                    self.election().resign(ResignRequest { leader }).await,
                    names,
                )
            }
            Step::Leader { name } => {
                answer(self.election().leader(LeaderRequest { name }).await, names)
            }
            Step::Observe { name } => self.observe(name, names).await,
            step => unreachable!("{step:?} is no contender's"),
        }
    }

    /// Of a campaign that was won, or one made up; lease 0 stands for none at all.
    fn leader_key(&self, name: Bytes, lease: i64, later: i64, names: &Names) -> Option<LeaderKey> {
        let won = self.won.get(&(name.clone(), lease)).cloned();
        if won.is_none() && lease == 0 {
            return None;
        }
        let mut key = won.unwrap_or_else(|| LeaderKey {
            key: names.contender(&name, lease),
            rev: names.beginning,
            lease: names.lease(lease),
            name,
        });
        key.rev += later;
        Some(key)
    }

    async fn observe(&self, name: Bytes, names: &Names) -> Answer {
        if Side::contenders(&self.channel, &name).await.is_empty() {
            return Answer("nothing to observe".to_owned());
        }
        match self.election().observe(LeaderRequest { name }).await {
            Ok(response) => match response.into_inner().message().await {
                Ok(Some(first)) => answer(Ok(Response::new(first)), names),
                Ok(None) => Answer("the stream has ended".to_owned()),
                Err(status) => refused(&status),
            },
            Err(status) => refused(&status),
        }
    }

    /// Begins a call, and waits until it has ended or has its place.
    async fn begin(
        &mut self,
        contest: Contest,
        names: &mut Names,
        call: impl Future<Output = Ended> + Send + 'static,
    ) -> Answer {
        let before = Side::contenders(&self.channel, &contest.0).await;
        let running = tokio::spawn(call);
        let own = (contest.1 != 0).then(|| names.contender(&contest.0, contest.1));
        let key = soon(|| async {
            let ended = running.is_finished();
            let now = Side::contenders(&self.channel, &contest.0).await;
            let placed = match &own {
                Some(own) => now.iter().find(|key| *key == own),
                None => now.iter().find(|key| !before.contains(key)),
            };
            match placed {
                Some(key) => Some(Some(key.clone())),
                None => ended.then_some(None),
            }
        })
        .await
        .flatten();
        let number = self.calls.len();
        self.calls.push(Call {
            number,
            contest,
            key,
            running: Some(running),
        });
        Answer(format!("call {number}"))
    }

    /// Waits for every call that nothing holds up, and says how they ended.
    pub async fn settle(&mut self, names: &mut Names) -> Vec<String> {
        let mut ended = Vec::new();
        for call in &mut self.calls {
            let Some(running) = &mut call.running else {
                continue;
            };
            if let Some(key) = &call.key {
                let contenders = Side::contenders(&self.channel, &call.contest.0).await;
                let gone = !contenders.contains(key);
                let last = contenders.is_empty();
                if !last && (gone || contenders.first() != Some(key)) {
                    continue;
                }
            }
            let end = tokio::time::timeout(crate::support::PATIENCE, running).await;
            call.running = None;
            let (number, Ok(end)) = (call.number, end) else {
                ended.push(format!("call {} does not end", call.number));
                continue;
            };
            let end = match end.unwrap() {
                Ended::Lock(result) => {
                    if let Ok(response) = &result {
                        let key = response.get_ref().key.clone();
                        self.locked.insert(call.contest.clone(), key);
                    }
                    answer(result, names)
                }
                Ended::Campaign(result) => {
                    if let Ok(response) = &result
                        && let Some(leader) = response.get_ref().leader.clone()
                    {
                        self.won.insert(call.contest.clone(), leader);
                    }
                    answer(result, names)
                }
            };
            ended.push(format!("call {number}: {}", end.0));
        }
        ended
    }
}
