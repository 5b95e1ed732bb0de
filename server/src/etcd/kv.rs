//! `etcdserverpb.KV`.

use async_trait::async_trait;
use conclave_core::{
    keyspace::{KeyRange, Record},
    replica::{AnswerBody, Query},
};
use conclave_proto::{
    etcd::{
        etcdserverpb::{
            CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse,
            PutRequest, PutResponse, RangeRequest, RangeResponse, RangeStreamResponse, TxnRequest,
            TxnResponse, kv_server::Kv,
        },
        mvccpb::KeyValue,
    },
    internal::{self, command::Body, operation::Operation as Kind},
};
use prost::Message as _;
use tokio_stream::Empty;
use tonic::{Request, Response, Status};

use super::{Etcd, signed, status::Error};
use crate::{metrics::Method, status::Refusal};

const ANOTHER_KIND: Error = Error::Refused(Refusal::Internal("KV"));

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct KvService(pub(super) Etcd);

#[async_trait]
impl Kv for KvService {
    type RangeStreamStream = Empty<Result<RangeStreamResponse, Status>>;

    async fn range(
        &self,
        request: Request<RangeRequest>,
    ) -> Result<Response<RangeResponse>, Status> {
        let etcd = &self.0;
        etcd.serve(Method::KvRange, request, |request| range(etcd, request))
            .await
    }

    async fn range_stream(
        &self,
        _request: Request<RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(super::status::unknown_method(
            "/etcdserverpb.KV/RangeStream",
        ))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let etcd = &self.0;
        etcd.serve(Method::KvPut, request, |request| put(etcd, request))
            .await
    }

    async fn delete_range(
        &self,
        _request: Request<DeleteRangeRequest>,
    ) -> Result<Response<DeleteRangeResponse>, Status> {
        Err(super::status::unknown_method(
            "/etcdserverpb.KV/DeleteRange",
        ))
    }

    async fn txn(&self, _request: Request<TxnRequest>) -> Result<Response<TxnResponse>, Status> {
        Err(super::status::unknown_method("/etcdserverpb.KV/Txn"))
    }

    async fn compact(
        &self,
        _request: Request<CompactionRequest>,
    ) -> Result<Response<CompactionResponse>, Status> {
        Err(super::status::unknown_method("/etcdserverpb.KV/Compact"))
    }
}

async fn range(etcd: &Etcd, request: RangeRequest) -> Result<RangeResponse, Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    let query = Query::Range {
        range: KeyRange::new(request.key, request.range_end),
        revision: u64::try_from(request.revision).ok().filter(|at| *at > 0),
        limit: usize::MAX,
    };
    let answer = etcd.read(query).await?;
    let AnswerBody::Range(Ok(records)) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    Ok(RangeResponse {
        header: etcd.header(answer.revision, answer.term),
        count: signed(records.len() as u64),
        kvs: records.into_iter().map(key_value).collect(),
        more: false,
    })
}

async fn put(etcd: &Etcd, request: PutRequest) -> Result<PutResponse, Error> {
    if request.key.is_empty() {
        return Err(Error::EmptyKey);
    }
    etcd.check_size(request.encoded_len())?;
    let put = internal::Put {
        key: request.key,
        value: request.value,
        lease: request.lease,
    };
    let operation = internal::Operation {
        operation: Some(Kind::Put(put)),
    };
    let txn = internal::Txn {
        success: vec![operation],
        ..internal::Txn::default()
    };
    let answer = etcd.command(Body::Txn(txn)).await?;
    Ok(PutResponse {
        header: etcd.header(answer.revision, answer.term),
        prev_kv: None,
    })
}

/// A version of a key as the wire has it.
pub(super) fn key_value(record: Record) -> KeyValue {
    KeyValue {
        key: record.key,
        create_revision: signed(record.create_revision),
        mod_revision: signed(record.mod_revision),
        version: signed(record.version),
        value: record.value,
        lease: record.lease.map_or(0, |lease| lease.0),
    }
}
