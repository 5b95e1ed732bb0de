//! The elections of the fake servers: a leader for each, and one history of all.

use std::pin::Pin;

use conclave_proto::v1::{self, election_server, session_event::Event};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::UnboundedReceiverStream};
use tonic::{Request, Response, Status};

use super::{Found, Holder, Server, Servers, State, key, number, refusal};

/// Of all elections together.
#[derive(Debug, Default)]
pub(crate) struct Elections {
    leaders: std::collections::BTreeMap<String, (Holder, v1::Leader)>,
    history: Vec<v1::ObserveResponse>,
    observers: Vec<Observer>,
    /// Which server was asked, and what the observer had been told before.
    pub(crate) observed: Vec<(usize, u64)>,
}

#[derive(Debug)]
struct Observer {
    server: usize,
    sender: mpsc::UnboundedSender<Result<v1::ObserveResponse, Status>>,
}

impl Elections {
    fn changed(&mut self, revision: u64, leader: Option<v1::Leader>) {
        let told = v1::ObserveResponse {
            header: None,
            revision,
            leader,
        };
        self.history.push(told.clone());
        self.observers
            .retain(|observer| observer.sender.send(Ok(told.clone())).is_ok());
    }

    /// What was asked for with this number is given up, if it was granted.
    pub(super) fn withdraw(&mut self, revision: u64, session: i64, request: u64) {
        let before = self.leaders.len();
        self.leaders
            .retain(|_, (holder, _)| (holder.session, holder.request) != (session, request));
        if self.leaders.len() < before {
            self.changed(revision, None);
        }
    }

    pub(super) fn end(&mut self, session: i64) {
        self.leaders
            .retain(|_, (holder, _)| holder.session != session);
    }

    pub(crate) fn leader(&self, name: &str) -> Option<&v1::Leader> {
        self.leaders.get(name).map(|(_, leader)| leader)
    }

    /// All values that were ever proclaimed, in order.
    pub(crate) fn values(&self) -> Vec<String> {
        let leaders = self.history.iter().filter_map(|told| told.leader.as_ref());
        leaders
            .map(|leader| String::from_utf8_lossy(&leader.value).into_owned())
            .collect()
    }
}

impl Servers {
    /// Ends the streams of observers at a server.
    pub(crate) fn end_observers(&self, index: usize, status: &Status) {
        let mut state = self.shared.state();
        state.elections.observers.retain(|observer| {
            if observer.server == index {
                observer.sender.send(Err(status.clone())).ok();
            }
            observer.server != index
        });
    }

    /// Ends leadership without a word to the leader.
    pub(crate) fn usurp(&self, name: &str) -> Holder {
        let mut state = self.shared.state();
        state.last += 1;
        let revision = state.last;
        let (holder, _) = state.elections.leaders.remove(name).unwrap();
        state.elections.changed(revision, None);
        drop(state);
        self.shared.changed.notify_waiters();
        holder
    }

    /// Ends leadership, and tells the leader.
    pub(crate) fn depose(&self, name: &str) {
        let holder = self.usurp(name);
        let lost = v1::GrantLost {
            grant: Some(v1::Grant {
                token: holder.token,
                ..v1::Grant::default()
            }),
            reason: v1::LossReason::Forced.into(),
            detail: "deposed".to_owned(),
        };
        let state = self.shared.state();
        let event = v1::SessionEvent {
            session_id: holder.session,
            revision: state.last,
            event: Some(Event::GrantLost(lost)),
        };
        let watcher = state.sessions[&holder.session].as_ref();
        watcher.expect("it is followed").send(Ok(event)).unwrap();
    }
}

/// The term, or `None` if the candidate must wait.
fn try_lead(state: &mut State, request: &v1::CampaignRequest) -> Result<Option<u64>, Status> {
    let number = number(request.number.as_ref());
    let leader = state.elections.leaders.get(&request.name);
    let holder = leader.map(|(holder, _)| holder);
    match state.find(holder, (request.session_id, number), request.wait_ms)? {
        Found::Itself(term) => return Ok(Some(term)),
        Found::Another => return Ok(None),
        Found::Nobody => {}
    }
    state.last += 1;
    let term = state.last;
    let holder = Holder {
        session: request.session_id,
        owner: request.owner.clone(),
        request: number,
        token: term,
    };
    let leader = v1::Leader {
        term,
        value: request.value.clone(),
        proclaimed_revision: term,
        session_id: request.session_id,
        ..v1::Leader::default()
    };
    let name = request.name.clone();
    let elections = &mut state.elections;
    elections.leaders.insert(name, (holder, leader.clone()));
    elections.changed(term, Some(leader));
    Ok(Some(term))
}

#[tonic::async_trait]
impl election_server::Election for Server {
    type ObserveStream = Pin<Box<dyn Stream<Item = Result<v1::ObserveResponse, Status>> + Send>>;

    async fn campaign(
        &self,
        request: Request<v1::CampaignRequest>,
    ) -> Result<Response<v1::CampaignResponse>, Status> {
        self.enter().await?;
        let request = request.into_inner();
        let attempt = |state: &mut State| try_lead(state, &request);
        let term = self.granted(request.wait_ms, attempt).await?;
        self.leave(v1::CampaignResponse {
            header: self.header(),
            key: key(&request.name, request.session_id),
            term,
        })
    }

    async fn proclaim(
        &self,
        request: Request<v1::ProclaimRequest>,
    ) -> Result<Response<v1::ProclaimResponse>, Status> {
        self.enter().await?;
        let request = request.into_inner();
        let once = (request.session_id, number(request.number.as_ref()));
        {
            let mut state = self.shared.state();
            if state.released.insert(once) {
                state.last += 1;
                let revision = state.last;
                let elections = &mut state.elections;
                let leader = match elections.leaders.get_mut(&request.name) {
                    Some((holder, leader)) if holder.token == request.term => leader,
                    _ => return Err(refusal("NOT_HOLDER")),
                };
                leader.value = request.value;
                leader.proclaimed_revision = revision;
                let leader = leader.clone();
                elections.changed(revision, Some(leader));
            }
        }
        self.leave(v1::ProclaimResponse {
            header: self.header(),
        })
    }

    async fn resign(
        &self,
        request: Request<v1::ResignRequest>,
    ) -> Result<Response<v1::ResignResponse>, Status> {
        self.enter().await?;
        let request = request.into_inner();
        let once = (request.session_id, number(request.number.as_ref()));
        {
            let mut state = self.shared.state();
            if state.released.insert(once) {
                let leads = state.elections.leader(&request.name);
                if leads.is_none_or(|leader| leader.term != request.term) {
                    return Err(refusal("NOT_HOLDER"));
                }
                state.elections.leaders.remove(&request.name);
                state.last += 1;
                let revision = state.last;
                state.elections.changed(revision, None);
            }
        }
        self.leave(v1::ResignResponse {
            header: self.header(),
        })
    }

    async fn cancel(
        &self,
        _request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn leader(
        &self,
        request: Request<v1::LeaderRequest>,
    ) -> Result<Response<v1::LeaderResponse>, Status> {
        self.enter_anywhere().await;
        let leader = self
            .shared
            .state()
            .elections
            .leader(&request.get_ref().name)
            .cloned();
        Ok(Response::new(v1::LeaderResponse {
            header: self.header(),
            leader,
        }))
    }

    async fn observe(
        &self,
        request: Request<v1::ObserveRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        self.enter_anywhere().await;
        let v1::ObserveRequest {
            name,
            after_revision,
        } = request.into_inner();
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut state = self.shared.state();
        let now = v1::ObserveResponse {
            header: None,
            revision: state.last,
            leader: state.elections.leader(&name).cloned(),
        };
        let elections = &mut state.elections;
        elections.observed.push((self.index, after_revision));
        if after_revision == 0 {
            sender.send(Ok(now)).unwrap();
        } else {
            let later = elections.history.iter();
            for told in later.filter(|told| told.revision > after_revision) {
                sender.send(Ok(told.clone())).unwrap();
            }
        }
        elections.observers.push(Observer {
            server: self.index,
            sender,
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(
            receiver,
        ))))
    }

    async fn list(
        &self,
        _request: Request<v1::ListElectionsRequest>,
    ) -> Result<Response<v1::ListElectionsResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }
}
