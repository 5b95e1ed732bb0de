//! Elections: a campaign that becomes leadership, and leadership.

use std::{
    future::IntoFuture,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use conclave_proto::v1::ProclaimRequest;
use tokio::sync::Mutex;

use crate::{
    contention::{Contended, Held, Wish, contend, until_answered},
    error::Error,
    session::{Core, Session},
    session_state::LossReason,
    transport::{ATTEMPT_TIMEOUT, Failed},
};

/// A wish to lead; await it. Made by [`Session::campaign`].
///
/// Dropped before it is done, it is withdrawn: the candidate, or the leadership already
/// on its way, is given up.
///
/// ```no_run
/// # async fn example(session: conclave_client::Session) -> Result<(), conclave_client::Error> {
/// let leadership = session.campaign("primary").value("10.0.0.7:5432").await?;
/// tokio::select! {
///     reason = leadership.lost() => eprintln!("stop, somebody else may lead: {reason}"),
///     () = serve(leadership.term()) => leadership.resign().await?,
/// }
/// # Ok(()) }
/// # async fn serve(_term: u64) {}
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct Campaign {
    session: Session,
    election: Contended,
    wait: Option<Duration>,
    value: Bytes,
}

/// Leadership. Dropped, it is resigned in the background, with no word about success;
/// better call [`Leadership::resign`].
#[derive(Debug)]
#[must_use = "dropped, it is given up"]
pub struct Leadership {
    held: Held,
    /// Taken by whoever proclaims, in order.
    turn: Arc<Mutex<()>>,
}

impl Campaign {
    pub(crate) fn new(session: Session, name: String) -> Campaign {
        Campaign {
            session,
            election: Contended::new(name, String::new()),
            wait: None,
            value: Bytes::new(),
        }
    }

    /// What to proclaim with the first moment of leadership: mostly where the leader
    /// can be reached. At most 64 KiB.
    pub fn value(mut self, value: impl Into<Bytes>) -> Campaign {
        self.value = value.into();
        self
    }

    /// On behalf of this owner: one session has one candidate for each owner. At most
    /// 256 bytes.
    pub fn owner(mut self, owner: impl Into<String>) -> Campaign {
        self.election.owner = owner.into();
        self
    }

    /// Waits this long at most, by the cluster's clock: perhaps some seconds longer
    /// while the cluster has no leader, or a server hangs.
    pub fn wait(mut self, limit: Duration) -> Campaign {
        self.wait = Some(limit);
        self
    }

    /// Leads at once or fails with [`Error::LockHeld`]; with [`Error::Unreachable`] if no
    /// server answers in five seconds, and then it is withdrawn.
    pub fn try_now(self) -> Campaign {
        self.wait(Duration::ZERO)
    }

    async fn lead(self) -> Result<Leadership, Error> {
        let Campaign {
            session,
            election,
            wait,
            value,
        } = self;
        let held = contend(session, election, Wish::Lead(value), wait).await?;
        Ok(Leadership::new(held))
    }
}

impl IntoFuture for Campaign {
    type Output = Result<Leadership, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.lead())
    }
}

impl Leadership {
    pub(crate) fn new(held: Held) -> Leadership {
        Leadership {
            held,
            turn: Arc::default(),
        }
    }

    /// The name of the election.
    pub fn name(&self) -> &str {
        &self.held.contended().name
    }

    /// The term, which is the fencing token: no other leader ever has it, and later ones
    /// have higher terms. Hand it to whatever the leader works on, and let that refuse
    /// lower ones.
    pub fn term(&self) -> u64 {
        self.held.token()
    }

    /// The key that leadership stands for, as etcd clients see it.
    pub fn key(&self) -> &Bytes {
        self.held.key()
    }

    /// The session that leadership is bound to.
    pub fn session(&self) -> &Session {
        self.held.session()
    }

    /// Time for which this certainly leads unless an operator ends it, as far as this
    /// client knows; zero once it is lost.
    pub fn remaining(&self) -> Duration {
        self.held.remaining()
    }

    /// Resolves when leadership is lost, with the reason: the session ended, an
    /// operator ended it, its key was deleted. What only a leader may do must stop
    /// then. Safe to drop and call again.
    pub async fn lost(&self) -> LossReason {
        self.held.lost().await
    }

    /// Tells this to everyone who observes, and waits for the word of the cluster.
    /// Calls are carried out one after another; one that is dropped half-way is carried
    /// out all the same. At most 64 KiB. It goes on as long as the session lives: wrap it
    /// in a timeout to wait for less.
    ///
    /// # Errors
    /// [`Error::NotHolder`] or [`Error::SessionLost`] if leadership was lost.
    pub async fn proclaim(&self, value: impl Into<Bytes>) -> Result<(), Error> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let core = Arc::clone(self.session().core());
        let proclamation = Proclamation {
            election: self.held.contended().clone(),
            term: self.term(),
            value: value.into(),
            request: core.begin_request()?,
        };
        let runtime = core.transport().runtime().clone();
        let told = runtime.spawn(async move {
            let attempt = || proclamation.attempt(&core);
            let told = until_answered(&core, proclamation.request, attempt).await;
            drop(turn);
            told
        });
        told.await.expect("it neither panics nor is stopped")
    }

    /// Gives leadership up and waits for the word of the cluster, as long as the session
    /// lives. Dropped half-way, it goes on in the background.
    ///
    /// # Errors
    /// [`Error::NotHolder`] or [`Error::SessionLost`] if it had been lost before.
    pub async fn resign(self) -> Result<(), Error> {
        self.held.give_up().await
    }
}

/// One proclamation, with its number.
struct Proclamation {
    election: Contended,
    term: u64,
    value: Bytes,
    request: u64,
}

impl Proclamation {
    async fn attempt(&self, core: &Core) -> Result<(), Failed> {
        let request = ProclaimRequest {
            name: self.election.name.clone(),
            session_id: core.id(),
            owner: self.election.owner.clone(),
            term: self.term,
            value: self.value.clone(),
            number: Some(core.number(self.request)),
        };
        let call = core.transport().call(ATTEMPT_TIMEOUT, request);
        call.await.map(drop)
    }
}

/// Runs a service on one of several processes at a time: campaigns, runs `active` while
/// it leads, and campaigns again when leadership is lost. When `active` ends by itself,
/// leadership is given up, and its result returned, also if leadership went meanwhile.
///
/// When leadership is lost, the future that `active` made is dropped: what it has
/// spawned it must stop itself. Between the loss and that drop lies what the executor
/// needs; only the term, checked where the effect happens, makes a stale leader harmless.
///
/// ```no_run
/// # async fn example(session: conclave_client::Session) -> Result<(), conclave_client::Error> {
/// use conclave_client::stand_by;
///
/// let campaign = session.campaign("primary").value("10.0.0.7:5432");
/// stand_by(campaign, |leadership| async move {
///     println!("primary in term {}", leadership.term());
///     std::future::pending::<()>().await
/// })
/// .await
/// # }
/// ```
///
/// # Errors
/// What the campaign fails with: [`Error::SessionLost`] above all.
pub async fn stand_by<T, F>(
    campaign: Campaign,
    mut active: impl FnMut(Arc<Leadership>) -> F,
) -> Result<T, Error>
where
    F: Future<Output = T>,
{
    loop {
        let leadership = Arc::new(campaign.clone().await?);
        let mut active = pin!(active(Arc::clone(&leadership)));
        tokio::select! {
            biased;
            reason = leadership.lost() => {
                tracing::info!(election = leadership.name(), %reason, "leadership lost");
            }
            done = &mut active => {
                // If `active` has kept it, it is resigned when that lets it go.
                if let Some(leadership) = Arc::into_inner(leadership)
                    && let Err(error) = leadership.resign().await
                {
                    tracing::debug!(%error, "leadership went before it was resigned");
                }
                return Ok(done);
            }
        }
    }
}
