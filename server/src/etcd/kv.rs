//! `etcdserverpb.KV`: `range` has what reads, `convert` both sides of the wire.

mod convert;
mod range;

pub(crate) use convert::key_value;

use async_trait::async_trait;
use conclave_core::{
    keyspace::{
        RevisionError,
        txn::{self, OperationReply},
    },
    replica::{AnswerBody, Query},
};
use conclave_proto::{
    etcd::etcdserverpb::{
        CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
        PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest, TxnResponse,
        kv_server::Kv,
    },
    internal::{Compact, command::Body},
};
use prost::Message as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Etcd, status::Error};
use crate::{
    gateway::Answer,
    metrics::{Counted, Method},
    status::Refusal,
};

const ANOTHER_KIND: Error = Error::Refused(Refusal::Internal("KV"));

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct KvService(pub(super) Etcd);

#[async_trait]
impl Kv for KvService {
    type RangeStreamStream = Counted<ReceiverStream<Result<RangeStreamResponse, Status>>>;

    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let etcd = &self.0;
        etcd.serve(Method::KvRange, request, |request| {
            range::range(etcd, request)
        })
        .await
    }

    async fn range_stream(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        let etcd = &self.0;
        let open = async |request, _| range::stream(etcd, request);
        etcd.stream(Method::KvRangeStream, request, open).await
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let etcd = &self.0;
        etcd.serve(Method::KvPut, request, |request| put(etcd, request))
            .await
    }

    async fn delete_range(
        &self,
        request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        let etcd = &self.0;
        etcd.serve(Method::KvDeleteRange, request, |request| {
            delete(etcd, request)
        })
        .await
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        let etcd = &self.0;
        etcd.serve(Method::KvTxn, request, |request| transact(etcd, request))
            .await
    }

    async fn compact(
        &self,
        request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        let etcd = &self.0;
        etcd.serve(Method::KvCompact, request, |request| compact(etcd, request))
            .await
    }
}

async fn put(etcd: &Etcd, request: PutRequest) -> Result<PutResponse, Error> {
    let bytes = request.encoded_len();
    let put = convert::put(request);
    txn::check_put(&put)?;
    etcd.check_size(bytes)?;
    let (answer, reply) = operate(etcd, Body::Put(put)).await?;
    let OperationReply::Put(previous) = reply else {
        return Err(ANOTHER_KIND);
    };
    Ok(PutResponse {
        header: etcd.header(answer.revision, answer.term),
        prev_kv: previous.map(key_value),
    })
}

async fn delete(etcd: &Etcd, request: DeleteRangeRequest) -> Result<DeleteRangeResponse, Error> {
    let bytes = request.encoded_len();
    let delete = convert::delete(request);
    txn::check_delete(&delete)?;
    etcd.check_size(bytes)?;
    let (answer, reply) = operate(etcd, Body::DeleteRange(delete)).await?;
    let OperationReply::DeleteRange { deleted, previous } = reply else {
        return Err(ANOTHER_KIND);
    };
    let header = etcd.header(answer.revision, answer.term);
    Ok(convert::deleted(header, deleted, previous))
}

/// Has a put or a delete replicated.
async fn operate(etcd: &Etcd, body: Body) -> Result<(Answer, OperationReply), Error> {
    let mut answer = etcd.command(body).await?;
    match std::mem::replace(&mut answer.body, AnswerBody::Done) {
        AnswerBody::Operation(reply) => Ok((answer, reply?)),
        _ => Err(ANOTHER_KIND),
    }
}

async fn transact(etcd: &Etcd, request: TxnRequest) -> Result<TxnResponse, Error> {
    let bytes = request.encoded_len();
    let reads = range::of_txn(&request);
    let txn = convert::txn(request);
    txn::check(&txn, etcd.settings.max_txn_ops)?;
    if let Some(consistency) = reads {
        return range::txn(etcd, &txn, consistency).await;
    }
    etcd.check_size(bytes)?;
    let answer = etcd.command(Body::Txn(txn)).await?;
    let AnswerBody::Txn(reply) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let header = etcd.header(answer.revision, answer.term);
    Ok(convert::transacted(header, reply?, answer.revision))
}

async fn compact(etcd: &Etcd, request: CompactionRequest) -> Result<CompactionResponse, Error> {
    let CompactionRequest { revision, physical } = request;
    let answer = match u64::try_from(revision) {
        // Nothing is ever below 0, so that is compacted as long as nothing else is.
        Ok(0) => compact_nothing(etcd).await?,
        Ok(revision) => {
            let answer = etcd.command(Body::Compact(Compact { revision })).await?;
            if physical {
                etcd.read_local(Query::Swept(revision)).await?;
            }
            answer
        }
        Err(_) => return Err(Error::Revision(etcd.below_compaction())),
    };
    Ok(CompactionResponse {
        header: etcd.header(answer.revision, answer.term),
    })
}

async fn compact_nothing(etcd: &Etcd) -> Result<Answer, Error> {
    let answer = etcd.read(|| Query::Barrier).await?;
    match etcd.below_compaction() {
        RevisionError::Compacted { compacted: 0, .. } => Ok(answer),
        error => Err(Error::Revision(error)),
    }
}
