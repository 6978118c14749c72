//! A gRPC client that knows nothing but what server reflection tells it, as evans and grpcurl do.

use std::collections::BTreeMap;

use prost::Message;
use prost_reflect::prost_types::FileDescriptorProto;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::Value;
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
use tonic_reflection::pb::v1alpha;

use crate::error::{Error, Result};

/// A connection to a server.
#[derive(Debug)]
pub struct Server {
    runtime: Runtime,
    channel: Channel,
}

/// Everything that can go wrong here is told in words.
fn failed(what: impl std::fmt::Display) -> impl FnOnce(Box<dyn std::error::Error>) -> Error {
    let what = what.to_string();
    move |e| Error::Grpc(format!("{what}: {e}"))
}

impl Server {
    /// Connects to `host:port`.
    pub fn connect(address: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| failed("starting the runtime")(e.into()))?;
        let channel = runtime.block_on(async { Endpoint::from_shared(format!("http://{address}"))?.connect().await });
        let channel = channel.map_err(|e| failed(format_args!("connecting to {address}"))(e.into()))?;
        Ok(Self { runtime, channel })
    }

    /// One question to the reflection service.
    fn reflect(&self, question: MessageRequest) -> Result<MessageResponse> {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
        let answer: Result<Option<ServerReflectionResponse>, Status> = self.runtime.block_on(async {
            let mut client = ServerReflectionClient::new(self.channel.clone());
            client.server_reflection_info(tokio_stream::once(request)).await?.into_inner().message().await
        });
        match answer.map_err(|e| failed("asking for reflection")(e.into()))?.and_then(|r| r.message_response) {
            Some(MessageResponse::ErrorResponse(e)) => Err(Error::Grpc(format!("reflection: {}", e.error_message))),
            Some(answer) => Ok(answer),
            None => Err(Error::Grpc("reflection gave no answer".into())),
        }
    }

    /// The names of all services.
    pub fn services(&self) -> Result<Vec<String>> {
        match self.reflect(MessageRequest::ListServices(String::new()))? {
            MessageResponse::ListServicesResponse(list) => Ok(list.service.into_iter().map(|s| s.name).collect()),
            other => Err(Error::Grpc(format!("reflection answered {other:?} to a list of services"))),
        }
    }

    /// The same through the older reflection service, which many clients still use.
    pub fn services_v1alpha(&self) -> Result<Vec<String>> {
        use v1alpha::server_reflection_client::ServerReflectionClient;
        use v1alpha::server_reflection_request::MessageRequest;
        use v1alpha::server_reflection_response::MessageResponse;
        let question = Some(MessageRequest::ListServices(String::new()));
        let request = v1alpha::ServerReflectionRequest { host: String::new(), message_request: question };
        let answer: Result<Option<v1alpha::ServerReflectionResponse>, Status> = self.runtime.block_on(async {
            let mut client = ServerReflectionClient::new(self.channel.clone());
            client.server_reflection_info(tokio_stream::once(request)).await?.into_inner().message().await
        });
        match answer.map_err(|e| failed("asking for reflection v1alpha")(e.into()))?.and_then(|r| r.message_response) {
            Some(MessageResponse::ListServicesResponse(list)) => Ok(list.service.into_iter().map(|s| s.name).collect()),
            other => Err(Error::Grpc(format!("reflection v1alpha answered {other:?} to a list of services"))),
        }
    }

    /// The files that describe a service, with all they import.
    fn describe(&self, service: &str) -> Result<DescriptorPool> {
        let mut files: BTreeMap<String, FileDescriptorProto> = BTreeMap::new();
        let mut questions = vec![MessageRequest::FileContainingSymbol(service.to_owned())];
        while let Some(question) = questions.pop() {
            let MessageResponse::FileDescriptorResponse(found) = self.reflect(question)? else {
                return Err(Error::Grpc(format!("reflection gave no file for {service}")));
            };
            for bytes in found.file_descriptor_proto {
                let file = FileDescriptorProto::decode(bytes.as_slice()).map_err(|e| failed(service)(e.into()))?;
                files.insert(file.name().to_owned(), file);
            }
            let imported = files.values().flat_map(|f| &f.dependency).find(|name| !files.contains_key(*name));
            questions.extend(imported.map(|name| MessageRequest::FileByFilename(name.clone())));
        }
        let mut pool = DescriptorPool::new();
        pool.add_file_descriptor_protos(files.into_values()).map_err(|e| failed(service)(e.into()))?;
        Ok(pool)
    }

    /// Calls a method with one or more messages, given in protobuf's JSON form, where bytes are base64. Unary and
    /// streaming calls look the same on the wire, so one way of calling serves both.
    pub fn call(&self, service: &str, method: &str, messages: &[Value]) -> Result<Vec<Value>> {
        let what = format!("calling {service}/{method}");
        let pool = self.describe(service)?;
        let found = pool.get_service_by_name(service).and_then(|s| s.methods().find(|m| m.name() == method));
        let found = found.ok_or_else(|| Error::Grpc(format!("{what}: there is no such method")))?;
        let requests: Vec<DynamicMessage> = messages
            .iter()
            .map(|m| DynamicMessage::deserialize(found.input(), m).map_err(|e| failed(&what)(e.into())))
            .collect::<Result<_>>()?;
        let path: PathAndQuery = format!("/{service}/{method}").parse().map_err(|e| failed(&what)(Box::new(e)))?;
        let codec = DynamicCodec(found.output());
        let answers: Result<Vec<DynamicMessage>, Box<dyn std::error::Error>> = self.runtime.block_on(async {
            let mut client = Grpc::new(self.channel.clone());
            client.ready().await?;
            let stream = tokio_stream::iter(requests);
            let mut answers = client.streaming(Request::new(stream), path, codec).await?.into_inner();
            let mut all = Vec::new();
            while let Some(answer) = answers.message().await? {
                all.push(answer);
            }
            Ok(all)
        });
        let json = |m: DynamicMessage| {
            let options = SerializeOptions::new().skip_default_fields(false);
            m.serialize_with_options(serde_json::value::Serializer, &options).map_err(|e| failed(&what)(e.into()))
        };
        answers.map_err(failed(&what))?.into_iter().map(json).collect()
    }
}

/// Messages whose type is known only at run time; holds the answer's type.
#[derive(Debug, Clone)]
struct DynamicCodec(MessageDescriptor);

impl Codec for DynamicCodec {
    type Encode = DynamicMessage;
    type Decode = DynamicMessage;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        self.clone()
    }

    fn decoder(&mut self) -> Self {
        self.clone()
    }
}

impl Encoder for DynamicCodec {
    type Item = DynamicMessage;
    type Error = Status;

    fn encode(&mut self, message: DynamicMessage, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        message.encode(buffer).map_err(|e| Status::internal(e.to_string()))
    }
}

impl Decoder for DynamicCodec {
    type Item = DynamicMessage;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<DynamicMessage>, Status> {
        let mut message = DynamicMessage::new(self.0.clone());
        message.merge(buffer).map_err(|e| Status::internal(e.to_string()))?;
        Ok(Some(message))
    }
}
