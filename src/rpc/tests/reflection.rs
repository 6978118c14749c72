//! Reflection and health: what evans and grpcurl ask before they can show anything.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{TestServer, in_memory};
use prost::Message as _;
use prost_types::{DescriptorProto, FileDescriptorProto, FileDescriptorSet};
use rpc::server::SERVICE_NAMES;
use rpc_client::proto::{SNIX_DESCRIPTORS, TVIX_DESCRIPTORS};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Asks one version of the protocol as evans does: for the services, then for each one's file and all it imports.
macro_rules! reflect {
    ($version:ident) => {{
        use tonic_reflection::pb::$version::ServerReflectionRequest;
        use tonic_reflection::pb::$version::server_reflection_client::ServerReflectionClient;
        use tonic_reflection::pb::$version::server_reflection_request::MessageRequest;
        use tonic_reflection::pb::$version::server_reflection_response::MessageResponse;

        let server = TestServer::tcp(in_memory());
        let mut client = ServerReflectionClient::new(server.channel());
        server.block_on(async {
            let mut ask = async |question: MessageRequest| {
                let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
                let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
                answers.into_inner().message().await.unwrap().unwrap().message_response.unwrap()
            };

            let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices(String::new())).await
            else {
                panic!("no list of services")
            };
            let services: BTreeSet<String> = list.service.into_iter().map(|service| service.name).collect();

            let mut files = BTreeMap::new();
            let mut questions: Vec<_> =
                services.iter().map(|service| MessageRequest::FileContainingSymbol(service.clone())).collect();
            while let Some(question) = questions.pop() {
                let MessageResponse::FileDescriptorResponse(answer) = ask(question.clone()).await else {
                    panic!("no file for {question:?}")
                };
                for encoded in answer.file_descriptor_proto {
                    let file = FileDescriptorProto::decode(&encoded[..]).unwrap();
                    let imports = file.dependency.iter().filter(|import| !files.contains_key(*import));
                    questions.extend(imports.cloned().map(MessageRequest::FileByFilename));
                    files.insert(file.name().to_owned(), file);
                }
            }
            (services, files)
        })
    }};
}

fn check(services: BTreeSet<String>, files: BTreeMap<String, FileDescriptorProto>, own: &str) {
    let expected = SERVICE_NAMES.into_iter().chain(["grpc.health.v1.Health", own]).map(str::to_owned);
    assert_eq!(services, expected.collect::<BTreeSet<_>>());

    let mut defined = BTreeSet::new();
    for file in files.values() {
        let names = file.service.iter().map(|service| service.name());
        defined.extend(names.map(|name| format!("{}.{name}", file.package())));
    }
    assert!(defined.is_superset(&services), "services without a description: {:?}", services.difference(&defined));

    let blobs = files["castore.proto"].service.iter().find(|service| service.name() == "BlobService").unwrap();
    let methods: Vec<_> = blobs.method.iter().map(|method| method.name()).collect();
    assert_eq!(methods, ["Stat", "Read", "Put"]);
    assert!(files["castore.proto"].message_type.iter().any(|message| message.name() == "BlobChunk"));
}

#[test]
fn v1() {
    let (services, files) = reflect!(v1);
    check(services, files, "grpc.reflection.v1.ServerReflection");
}

#[test]
fn v1alpha() {
    let (services, files) = reflect!(v1alpha);
    check(services, files, "grpc.reflection.v1alpha.ServerReflection");
}

#[test]
fn every_service_is_healthy() {
    let server = TestServer::tcp(in_memory());
    let mut client = HealthClient::new(server.channel());
    server.block_on(async {
        for service in SERVICE_NAMES.into_iter().chain([""]) {
            let answer = client.check(HealthCheckRequest { service: service.to_owned() }).await.unwrap();
            assert_eq!(answer.into_inner().status(), ServingStatus::Serving, "{service:?}");
        }
    });
}

/// Serving the snix names with the tvix services relies on it: both descriptions describe the same bytes.
#[test]
fn snix_messages_are_tvix_messages() {
    let tvix = shapes(TVIX_DESCRIPTORS);
    assert_eq!(tvix, shapes(SNIX_DESCRIPTORS));
    assert_eq!(tvix["castore.v1.Directory"][0], "1 Repeated Message castore.v1.DirectoryEntry");
}

/// Every message with the numbers and types of its fields, every enum with its values, every service with its methods.
/// Types have the names they have in snix, without the word snix.
fn shapes(descriptors: &[u8]) -> BTreeMap<String, Vec<String>> {
    let mut shapes = BTreeMap::new();
    for file in FileDescriptorSet::decode(descriptors).unwrap().file {
        for message in &file.message_type {
            add_message(file.package(), message, &mut shapes);
        }
        for service in &file.service {
            let methods = service.method.iter().map(|method| {
                let (input, output) = (common_name(method.input_type()), common_name(method.output_type()));
                let streams = (method.client_streaming(), method.server_streaming());
                format!("{} {input} {output} {streams:?}", method.name())
            });
            shapes.insert(common_name(&format!("{}.{}", file.package(), service.name())), methods.collect());
        }
    }
    shapes
}

fn add_message(scope: &str, message: &DescriptorProto, shapes: &mut BTreeMap<String, Vec<String>>) {
    let scope = format!("{scope}.{}", message.name());
    let fields = message.field.iter().map(|field| {
        format!("{} {:?} {:?} {}", field.number(), field.label(), field.r#type(), common_name(field.type_name()))
    });
    shapes.insert(common_name(&scope), fields.collect());
    for nested in &message.nested_type {
        add_message(&scope, nested, shapes);
    }
    for values in &message.enum_type {
        let named = values.value.iter().map(|value| format!("{} {}", value.number(), value.name()));
        shapes.insert(common_name(&format!("{scope}.{}", values.name())), named.collect());
    }
}

fn common_name(name: &str) -> String {
    let name = name.trim_start_matches('.').trim_start_matches("tvix.").trim_start_matches("snix.");
    name.strip_suffix("Node").map_or_else(|| name.to_owned(), |kind| format!("{kind}Entry"))
}
