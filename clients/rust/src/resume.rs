//! A session that goes on after a restart of its program: attached to with its
//! credentials, with what it held and what it still waits for.

use std::{future::IntoFuture, pin::Pin, time::Duration};

use conclave_proto::v1::{
    self, AttachSessionRequest, AttachSessionResponse, Place, RenewSessionRequest,
    session_client::SessionClient,
};

use tokio::time::Instant;

use crate::{
    client::{Client, PATIENCE, incomplete},
    clock,
    credentials::{Credentials, nonce},
    error::Error,
    lock::{Contended, LockGuard, Pending},
    requests::{Granted, Requests},
    session::Session,
    session_state::SessionState,
    transport::ATTEMPT_TIMEOUT,
};

/// A session that goes on; see [`Client::resume`].
#[derive(Debug)]
#[must_use = "dropped, everything is given up"]
pub struct Resumed {
    /// The session.
    pub session: Session,
    /// What it held when this program attached: of a grant that several acquires share,
    /// one for each of them.
    pub guards: Vec<LockGuard>,
    /// What it still waits for, of what was to be kept.
    pub waiting: Vec<Waiting>,
}

/// A place in the queue of a lock that an earlier start of this program took; await
/// it to hold the lock. Dropped before, it is given up.
#[derive(Debug)]
#[must_use = "dropped, its place is given up"]
pub struct Waiting {
    session: Session,
    pending: Pending,
}

impl Waiting {
    /// The name of the lock.
    pub fn name(&self) -> &str {
        self.pending.lock().name()
    }

    /// The owner inside the session; mostly empty.
    pub fn owner(&self) -> &str {
        self.pending.lock().owner()
    }
}

impl IntoFuture for Waiting {
    type Output = Result<LockGuard, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(
            self.pending
                .granted_within(self.session, None, Instant::now()),
        )
    }
}

/// Attaches, after asking how the session stands; then it must be renewed once before
/// anything is certain.
pub(crate) async fn resume(
    client: &Client,
    credentials: &Credentials,
    mut keep: impl FnMut(&str, &str) -> bool,
) -> Result<Resumed, Error> {
    let ask = AttachSessionRequest {
        session_id: credentials.session_id,
        secret: credentials.secret.to_bytes(),
        ..AttachSessionRequest::default()
    };
    let present = attach(client, ask.clone()).await?;
    let wanted = present.places.iter().filter(|place| {
        let contends = place.contends.as_ref();
        place.request != 0 && contends.is_some_and(|grant| keep(&grant.lock, &grant.owner))
    });
    let wanted: Vec<u64> = wanted.map(|place| place.request).collect();
    let attached = attach(
        client,
        AttachSessionRequest {
            replaces: present.attachment,
            nonce: nonce(),
            wanted: wanted.clone(),
            ..ask
        },
    )
    .await?;
    let state = confirm(client, credentials, &attached).await?;
    let mut requests = Requests::attached(attached.attachment, attached.last_request);
    wanted.iter().for_each(|request| requests.resume(*request));
    let ttl = Duration::from_millis(attached.ttl_ms);
    let session = Session::start(client, credentials.clone(), ttl, state, requests);
    Ok(take_up(session, attached, wanted))
}

async fn attach(
    client: &Client,
    request: AttachSessionRequest,
) -> Result<AttachSessionResponse, Error> {
    let call = |channel| {
        let request = request.clone();
        async move { SessionClient::new(channel).attach(request).await }
    };
    client
        .transport
        .repeat(PATIENCE, ATTEMPT_TIMEOUT, call)
        .await
}

/// Renews for the new attachment, so that it is known until when the session lives.
async fn confirm(
    client: &Client,
    credentials: &Credentials,
    attached: &AttachSessionResponse,
) -> Result<SessionState, Error> {
    let request = RenewSessionRequest {
        session_id: credentials.session_id,
        attachment: attached.attachment,
    };
    let mut sent = 0;
    let attempt = || {
        sent = clock::now();
        request
    };
    let renewed = client.transport.repeat_call(PATIENCE, attempt).await?;
    if renewed.ttl_ms == 0 {
        return Err(incomplete("ttl_ms"));
    }
    let ttl = renewed.ttl_ms.saturating_mul(1_000);
    Ok(SessionState::opened(sent, ttl))
}

/// Guards for what is held, and requests for what is waited for. One that was wanted
/// and has no place any more is decided, so it is asked for its answer, too.
fn take_up(session: Session, attached: AttachSessionResponse, wanted: Vec<u64>) -> Resumed {
    let revision = attached.header.map_or(u64::MAX, |header| header.revision);
    let mut guards = Vec::new();
    for v1::Grant {
        lock,
        owner,
        key,
        token,
        entries,
    } in attached.grants
    {
        let lock = Contended::new(lock, owner);
        let granted = Granted {
            key,
            token,
            revision,
        };
        let adopt =
            |entry| LockGuard::adopted(session.clone(), lock.clone(), granted.clone(), entry);
        guards.extend(entries.into_iter().map(adopt));
    }
    let mut waiting = Vec::new();
    for Place { contends, request } in attached.places {
        if let Some(grant) = contends.filter(|_| wanted.contains(&request)) {
            let lock = Contended::new(grant.lock, grant.owner);
            let pending = Pending::resumed(session.core(), lock, request);
            waiting.push(Waiting {
                session: session.clone(),
                pending,
            });
        }
    }
    let decided = wanted.into_iter().filter(|request| {
        !waiting
            .iter()
            .any(|waiting| waiting.pending.request_number() == *request)
    });
    decided.for_each(|request| session.core().end_request(request));
    Resumed {
        session,
        guards,
        waiting,
    }
}
