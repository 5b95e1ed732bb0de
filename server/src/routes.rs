//! Everything that is served on the client addresses.

use std::sync::Arc;

use conclave_proto::v1::{
    channel_server::ChannelServer, cluster_server::ClusterServer, election_server::ElectionServer,
    lock_server::LockServer, session_server::SessionServer,
};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::service::Routes;
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::HealthReporter,
};
use tonic_reflection::server::Builder;

use crate::{
    channel::ChannelService, cluster::ClusterService, election::ElectionService, etcd,
    gateway::Gateway, http, lock::LockService, session::SessionService,
};

/// What the health service knows; the empty name is the server as a whole.
const SERVICES: [&str; 6] = [
    "",
    "conclave.v1.Session",
    "conclave.v1.Lock",
    "conclave.v1.Election",
    "conclave.v1.Cluster",
    "conclave.v1.Channel",
];
/// What a request may have beyond its largest field.
pub(crate) const REQUEST_OVERHEAD_BYTES: usize = 512 << 10;
/// The contract between members is no business of clients.
const INTERNAL_PACKAGE: &str = "conclave.internal";

/// Routes for one I/O thread.
pub(crate) fn routes(gateway: &Arc<Gateway>, health: HealthServer<impl Health>) -> Routes {
    let bytes_max = gateway.settings.max_request_bytes + REQUEST_OVERHEAD_BYTES;
    let session = SessionServer::new(SessionService(Arc::clone(gateway)));
    let lock = LockServer::new(LockService(Arc::clone(gateway)));
    let election = ElectionServer::new(ElectionService(Arc::clone(gateway)));
    let cluster = ClusterServer::new(ClusterService(Arc::clone(gateway)));
    let channel = ChannelServer::new(ChannelService(Arc::clone(gateway)));
    let grpc = Routes::new(session.max_decoding_message_size(bytes_max))
        .add_service(lock.max_decoding_message_size(bytes_max))
        .add_service(election.max_decoding_message_size(bytes_max))
        .add_service(cluster.max_decoding_message_size(bytes_max))
        .add_service(channel.max_decoding_message_size(bytes_max))
        .add_service(health)
        .add_service(
            reflection()
                .build_v1()
                .expect("the schemas were compiled with this"),
        )
        .add_service(
            reflection()
                .build_v1alpha()
                .expect("the schemas were compiled with this"),
        );
    let grpc = etcd::add_services(grpc, gateway).into_axum_router();
    let json = etcd::json::routes(&grpc, bytes_max);
    let router = grpc.merge(json).merge(http::routes(Arc::clone(gateway)));
    Routes::from(router.fallback(http::unknown)).prepare()
}

/// Routes for addresses that serve no gRPC.
pub(crate) fn metrics_routes(gateway: &Arc<Gateway>) -> Routes {
    Routes::from(http::routes(Arc::clone(gateway)).fallback(http::unknown))
}

/// Tells the health service whether this server serves.
pub(crate) async fn report_health(reporter: &HealthReporter, serving: bool) {
    let status = if serving {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    };
    for service in SERVICES {
        reporter.set_service_status(service, status).await;
    }
}

fn reflection() -> Builder<'static> {
    Builder::configure()
        .register_file_descriptor_set(public_schemas())
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

fn public_schemas() -> FileDescriptorSet {
    let mut schemas = FileDescriptorSet::decode(conclave_proto::DESCRIPTORS)
        .expect("the schemas were compiled with this");
    schemas
        .file
        .retain(|file| file.package() != INTERNAL_PACKAGE);
    schemas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reflection_shows_the_native_api_and_nothing_internal() {
        let packages: Vec<_> = public_schemas()
            .file
            .iter()
            .map(|file| file.package().to_owned())
            .collect();
        assert!(packages.contains(&"conclave.v1".to_owned()));
        assert!(!packages.contains(&INTERNAL_PACKAGE.to_owned()));
        reflection().build_v1().unwrap();
        reflection().build_v1alpha().unwrap();
    }
}
