//! Reads. A large one takes many turns of the node: its first piece settles the
//! revision, and all others are read at that, from what this member has applied.

use conclave_core::{
    ids::{Revision, Term},
    keyspace::{Filter, Found, KeyRange, Piece, RevisionError, Selection, txn as rules},
    replica::{AnswerBody, Query},
};
use conclave_primitives::Primitives;
use conclave_proto::{
    etcd::{
        etcdserverpb::{
            RangeRequest, RangeResponse, RangeStreamResponse, ResponseOp, TxnRequest, TxnResponse,
            request_op::Request as RequestKind, response_op::Response as ResponseKind,
        },
        mvccpb::KeyValue,
    },
    internal::{self, operation::Operation},
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    super::{Etcd, signed, status::Error},
    ANOTHER_KIND, convert,
};
use crate::gateway::Answer;

/// How often a read of the present begins anew because a compaction has overtaken it.
const ATTEMPTS_MAX: usize = 3;
/// Messages of a stream that wait for its reader.
const STREAMED_AHEAD: usize = 1;

/// What a read may rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Consistency {
    /// A quorum's confirmation.
    Linearizable,
    /// What this member has applied.
    Local,
}

impl Consistency {
    fn of(request: &RangeRequest) -> Self {
        if request.serializable {
            Self::Local
        } else {
            Self::Linearizable
        }
    }

    async fn ask(
        self,
        etcd: &Etcd,
        query: impl Fn() -> Query<Primitives>,
    ) -> Result<Answer, Error> {
        Ok(match self {
            Self::Linearizable => etcd.read(query).await?,
            Self::Local => etcd.read_local(query()).await?,
        })
    }
}

pub(super) async fn range(etcd: &Etcd, request: RangeRequest) -> Result<RangeResponse, Error> {
    let consistency = Consistency::of(&request);
    let range = convert::range(request);
    rules::check_range(&range)?;
    let mut attempt = 1;
    let (seen, found) = loop {
        match read(etcd, &range, consistency).await {
            Err(Error::Revision(RevisionError::Compacted { .. }))
                if range.revision <= 0 && attempt < ATTEMPTS_MAX =>
            {
                attempt += 1;
            }
            outcome => break outcome?,
        }
    };
    Ok(convert::found(etcd.header(seen.revision, seen.term), found))
}

/// The revision and term at which a read began.
#[derive(Clone, Copy, Debug)]
struct Seen {
    revision: Revision,
    term: Term,
}

async fn read(
    etcd: &Etcd,
    range: &internal::Range,
    consistency: Consistency,
) -> Result<(Seen, Found), Error> {
    let mut selection = Selection::new(range).ok_or(rules::TxnError::UnknownOrder)?;
    let mut pieces = Pieces::new(etcd, range, consistency);
    while let Some(piece) = pieces.next(selection.filter(), selection.wanted()).await? {
        selection.add(piece);
    }
    Ok((pieces.seen, selection.finish()))
}

/// The pieces of a range, one after the other.
struct Pieces<'a> {
    etcd: &'a Etcd,
    /// What is left.
    rest: Option<KeyRange>,
    at: Option<Revision>,
    consistency: Consistency,
    seen: Seen,
}

impl<'a> Pieces<'a> {
    fn new(etcd: &'a Etcd, range: &internal::Range, consistency: Consistency) -> Self {
        Self {
            etcd,
            rest: Some(KeyRange::new(range.key.clone(), range.end.clone())),
            at: u64::try_from(range.revision).ok().filter(|at| *at > 0),
            consistency,
            seen: Seen {
                revision: 0,
                term: 0,
            },
        }
    }

    /// The next one, with its records filtered, and `limit` of them at most.
    async fn next(&mut self, filter: Filter, limit: usize) -> Result<Option<Piece>, Error> {
        let Some(range) = self.rest.take() else {
            return Ok(None);
        };
        let at = self.at;
        let query = || Query::Range {
            range: range.clone(),
            revision: at,
            filter,
            limit,
        };
        let answer = self.consistency.ask(self.etcd, query).await?;
        let AnswerBody::Range(Ok(mut piece)) = answer.body else {
            return Err(ANOTHER_KIND);
        };
        if self.seen.revision == 0 {
            self.seen = Seen {
                revision: answer.revision,
                term: answer.term,
            };
        }
        self.at.get_or_insert(answer.revision);
        self.consistency = Consistency::Local;
        self.rest = piece.next.take().map(|key| range.from(key));
        Ok(Some(piece))
    }
}

/// If a transaction only reads, and so needs no place in the log: how it reads. It does
/// so from this member alone if all of its ranges do.
pub(super) fn of_txn(request: &TxnRequest) -> Option<Consistency> {
    let mut all = Vec::with_capacity(request.success.len() + request.failure.len());
    for operation in request.success.iter().chain(&request.failure) {
        match &operation.request {
            Some(RequestKind::RequestRange(range)) => all.push(Consistency::of(range)),
            _ => return None,
        }
    }
    let is_local = !all.is_empty() && !all.contains(&Consistency::Linearizable);
    Some(if is_local {
        Consistency::Local
    } else {
        Consistency::Linearizable
    })
}

/// Runs a transaction that only reads: all of it at one revision.
pub(super) async fn txn(
    etcd: &Etcd,
    txn: &internal::Txn,
    consistency: Consistency,
) -> Result<TxnResponse, Error> {
    let mut attempt = 1;
    loop {
        match try_txn(etcd, txn, consistency).await {
            Err(Error::Revision(RevisionError::Compacted { asked, .. }))
                if attempt < ATTEMPTS_MAX && !asks_for(txn, asked) =>
            {
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}

/// Whether it is a range itself that asks for this revision, or for one below all, and
/// not only the moment at which the transaction read that was compacted meanwhile.
fn asks_for(txn: &internal::Txn, revision: Revision) -> bool {
    let mut operations = txn.success.iter().chain(&txn.failure);
    revision == 0
        || operations.any(|operation| {
            matches!(&operation.operation, Some(Operation::Range(range)) if range.revision == signed(revision))
        })
}

async fn try_txn(
    etcd: &Etcd,
    txn: &internal::Txn,
    consistency: Consistency,
) -> Result<TxnResponse, Error> {
    let query = || Query::Compare(txn.compares.clone());
    let answer = consistency.ask(etcd, query).await?;
    let AnswerBody::Compared(succeeded) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let succeeded = succeeded?;
    let branch = if succeeded {
        &txn.success
    } else {
        &txn.failure
    };
    let mut responses = Vec::with_capacity(branch.len());
    for operation in branch {
        let Some(Operation::Range(range)) = &operation.operation else {
            return Err(ANOTHER_KIND);
        };
        let mut range = range.clone();
        range.revision = revision_in_txn(etcd, range.revision, answer.revision)?;
        let (_, found) = read(etcd, &range, Consistency::Local).await?;
        let found = convert::found(convert::header_of(answer.revision), found);
        responses.push(ResponseOp {
            response: Some(ResponseKind::ResponseRange(found)),
        });
    }
    Ok(TxnResponse {
        header: etcd.header(answer.revision, answer.term),
        succeeded,
        responses,
    })
}

/// The revision at which a range of a transaction reads that began at `newest`.
fn revision_in_txn(etcd: &Etcd, asked: i64, newest: Revision) -> Result<i64, Error> {
    match u64::try_from(asked) {
        Ok(0) => Ok(signed(newest)),
        Ok(asked) if asked > newest => Err(RevisionError::Future { asked, newest }.into()),
        Ok(_) => Ok(asked),
        Err(_) => match etcd.below_compaction() {
            RevisionError::Compacted { compacted: 0, .. } => Ok(signed(newest)),
            error => Err(error.into()),
        },
    }
}

type Streamed = Result<RangeStreamResponse, Status>;

/// Sends what it reads as it reads it; keys come in order.
pub(super) fn stream(
    etcd: &Etcd,
    request: RangeRequest,
) -> Result<ReceiverStream<Streamed>, Error> {
    let consistency = Consistency::of(&request);
    let range = convert::range(request);
    rules::check_range(&range)?;
    let is_plain = Selection::new(&range).is_some_and(|selection| selection.is_plain());
    if !is_plain {
        return Err(Error::StreamNotPlain);
    }
    let (sender, receiver) = mpsc::channel(STREAMED_AHEAD);
    let etcd = etcd.clone();
    tokio::spawn(async move {
        let mut sending = Sending {
            sender,
            bytes_max: etcd.settings.max_request_bytes,
            batch: Vec::new(),
            bytes: 0,
        };
        if let Err(error) = send(&etcd, &range, consistency, &mut sending).await {
            // An error means that nobody reads it any more.
            sending.sender.send(Err(error.into_status())).await.ok();
        }
    });
    Ok(ReceiverStream::new(receiver))
}

async fn send(
    etcd: &Etcd,
    range: &internal::Range,
    consistency: Consistency,
    sending: &mut Sending,
) -> Result<(), Error> {
    let mut pieces = Pieces::new(etcd, range, consistency);
    let mut left = match usize::try_from(range.limit) {
        _ if range.count_only => 0,
        Ok(0) | Err(_) => usize::MAX,
        Ok(limit) => limit,
    };
    let mut last = RangeResponse::default();
    while let Some(piece) = pieces
        .next(Filter::default(), left.saturating_add(1))
        .await?
    {
        last.count += signed(piece.count);
        last.more |= piece.records.len() > left && !range.count_only;
        for mut record in piece.records.into_iter().take(left) {
            if range.keys_only {
                record.value = Default::default();
            }
            left -= 1;
            sending.add(convert::key_value(record)).await;
        }
        if sending.sender.is_closed() {
            return Ok(());
        }
    }
    last.header = etcd.header(pieces.seen.revision, pieces.seen.term);
    sending.flush(last).await;
    Ok(())
}

/// What was read and not sent yet.
struct Sending {
    sender: mpsc::Sender<Streamed>,
    bytes_max: usize,
    batch: Vec<KeyValue>,
    bytes: usize,
}

impl Sending {
    async fn add(&mut self, key_value: KeyValue) {
        let bytes = key_value.encoded_len();
        if !self.batch.is_empty() && self.bytes + bytes > self.bytes_max {
            self.flush(RangeResponse::default()).await;
        }
        self.bytes += bytes;
        self.batch.push(key_value);
    }

    async fn flush(&mut self, mut response: RangeResponse) {
        self.bytes = 0;
        response.kvs = std::mem::take(&mut self.batch);
        let message = RangeStreamResponse {
            range_response: Some(response),
        };
        // An error means that nobody reads it any more; that is looked at once a piece.
        self.sender.send(Ok(message)).await.ok();
    }
}
