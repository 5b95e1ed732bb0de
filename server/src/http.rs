//! What people and their tools ask over plain HTTP: health and metrics, on the
//! client addresses beside gRPC.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::get,
};
use conclave_core::replica::Query;
use serde_json::json;
use tokio::time;
use tonic::Status;

use crate::{etcd::VERSION, gateway::Gateway, metrics::Snapshot};

/// How long a health check waits for the cluster.
pub(crate) const READY_WITHIN: Duration = Duration::from_secs(1);

/// All routes.
pub(crate) fn routes(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .with_state(gateway)
}

/// What is not there: gRPC clients and people are told in their own terms.
pub(crate) async fn unknown(uri: Uri, headers: HeaderMap) -> Response {
    if is_grpc(&headers) {
        let service = uri.path().trim_start_matches('/').rsplit_once('/');
        let service = service.map_or("", |(service, _)| service);
        let status = Status::unimplemented(format!("unknown service {service}"));
        return status.into_http::<axum::body::Body>();
    }
    (StatusCode::NOT_FOUND, "not found\n").into_response()
}

/// Whether a request with these headers is a gRPC call.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Whether a linearizable read succeeds.
pub(crate) async fn is_ready(gateway: &Gateway) -> Result<(), String> {
    match time::timeout(READY_WITHIN, gateway.read(Query::Barrier)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(refusal)) => Err(refusal.to_string()),
        Err(_) => Err("a read got no answer in time".to_owned()),
    }
}

/// As etcd answers it.
async fn health(State(gateway): State<Arc<Gateway>>, uri: Uri) -> Response {
    let (status, health, reason) = match illness(&gateway, uri.query().unwrap_or_default()).await {
        None => (StatusCode::OK, "true", String::new()),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, "false", reason),
    };
    json_response(status, &json!({ "health": health, "reason": reason }))
}

/// What is wrong, but for alarms that the query excludes. A serializable check does not
/// ask the others.
async fn illness(gateway: &Gateway, query: &str) -> Option<String> {
    let has = |parameter: &str| query.split('&').any(|given| given == parameter);
    let status = gateway.handle.status();
    if status.is_out_of_space() && !has("exclude=NOSPACE") {
        return Some("ALARM NOSPACE".to_owned());
    }
    if has("serializable=true") {
        return status.is_behind.then(|| "RANGE ERROR:no state".to_owned());
    }
    if status.leader.is_none() {
        return Some("RAFT NO LEADER".to_owned());
    }
    let read = is_ready(gateway).await;
    read.err().map(|reason| format!("RANGE ERROR:{reason}"))
}

/// The process answers, and that is all that is asked: a member without a
/// leader must not be restarted for it.
async fn live() -> &'static str {
    "ok\n"
}

async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    match is_ready(&gateway).await {
        Ok(()) => "ok\n".into_response(),
        Err(reason) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {reason}\n"),
        )
            .into_response(),
    }
}

async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response {
    let status = gateway.handle.status();
    let text = gateway.metrics.render(&Snapshot {
        status: &status,
        member: &gateway.settings.name,
        watched_sessions: gateway.hub.watched(),
        log_bytes: gateway.handle.log_bytes(),
        installs: gateway.handle.installs(),
        links: gateway.peers.counters(),
    });
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// As etcd answers it, and what answers.
async fn version() -> Response {
    let body = json!({
        "etcdserver": VERSION,
        "etcdcluster": VERSION,
        "storage": VERSION,
        "server": "conclave",
        "version": env!("CARGO_PKG_VERSION"),
    });
    json_response(StatusCode::OK, &body)
}

fn json_response(status: StatusCode, body: &serde_json::Value) -> Response {
    (
        status,
        [(header::CONTENT_TYPE, "application/json")],
        body.to_string(),
    )
        .into_response()
}
