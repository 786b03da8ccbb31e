//! The server's own certificate authority, its serving certificate and client certificates.
//!
//! The CA lives in the data directory (`ca.crt`, `ca.key` with mode 0600) and survives restarts; the serving certificate is
//! made anew at each start.

use std::fs;
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::server::StartError;

/// A certificate and its key, both PEM.
#[derive(Clone)]
pub struct ClientCredentials {
    /// The certificate.
    pub certificate_pem: String,
    /// The PKCS#8 private key.
    pub key_pem: String,
}

impl std::fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientCredentials").finish_non_exhaustive()
    }
}

pub(crate) struct Authority {
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

fn certificate_error(what: &'static str) -> impl Fn(rcgen::Error) -> StartError {
    move |source| StartError::Certificate { what, why: source.to_string() }
}

fn authority_parameters() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, "kubernetes");
    parameters.distinguished_name = name;
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    parameters
}

/// Writes a file that only its owner reads, whole or not at all.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> Result<(), StartError> {
    let failed = |source| StartError::File { path: path.to_owned(), source };
    let partial = path.with_extension("partial");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial).map_err(failed)?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&partial, path).map_err(failed)
}

impl Authority {
    /// Reads the CA of a data directory, or makes one.
    pub(crate) fn open(directory: &Path) -> Result<Self, StartError> {
        let (certificate_path, key_path) = (directory.join("ca.crt"), directory.join("ca.key"));
        if !key_path.exists() || !certificate_path.exists() {
            let key = KeyPair::generate().map_err(certificate_error("make the CA's key"))?;
            let certificate =
                authority_parameters().self_signed(&key).map_err(certificate_error("sign the CA certificate"))?;
            write_private(&key_path, key.serialize_pem().as_bytes())?;
            write_private(&certificate_path, certificate.pem().as_bytes())?;
        }
        let read =
            |path: &Path| fs::read_to_string(path).map_err(|source| StartError::File { path: path.to_owned(), source });
        let certificate_pem = read(&certificate_path)?;
        let key = KeyPair::from_pem(&read(&key_path)?).map_err(certificate_error("read the CA's key"))?;
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|source| StartError::Certificate { what: "read the CA certificate", why: source.to_string() })?;
        Ok(Self { certificate_pem, certificate, issuer: Issuer::new(authority_parameters(), key) })
    }

    pub(crate) fn pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A client certificate: user as common name, groups (at most two) as organisations.
    pub(crate) fn client(&self, user: &str, groups: &[&str]) -> Result<ClientCredentials, StartError> {
        let mut parameters = CertificateParams::default();
        let mut name = DistinguishedName::new();
        // rcgen keeps one value a type, so a second organisation goes under the same identifier spelt out.
        let types = [DnType::OrganizationName, DnType::CustomDnType(vec![2, 5, 4, 10])];
        if groups.len() > types.len() {
            let why = format!("{user:?} has {} groups; a client certificate carries at most two here", groups.len());
            return Err(StartError::Certificate { what: "sign a client certificate", why });
        }
        for (kind, group) in types.into_iter().zip(groups) {
            name.push(kind, *group);
        }
        name.push(DnType::CommonName, user);
        parameters.distinguished_name = name;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().map_err(certificate_error("make a client key"))?;
        let certificate =
            parameters.signed_by(&key, &self.issuer).map_err(certificate_error("sign a client certificate"))?;
        Ok(ClientCredentials { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// TLS for serving under these names: clients may show a certificate of this CA.
    pub(crate) fn server_config(&self, names: &[String]) -> Result<Arc<ServerConfig>, StartError> {
        let tls = |what: &'static str| {
            move |source: &dyn std::fmt::Display| StartError::Certificate { what, why: source.to_string() }
        };
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for name in names {
            let san = match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(
                    name.as_str().try_into().map_err(certificate_error("put a name into the serving certificate"))?,
                ),
            };
            parameters.subject_alt_names.push(san);
        }
        let key = KeyPair::generate().map_err(certificate_error("make the serving key"))?;
        let certificate =
            parameters.signed_by(&key, &self.issuer).map_err(certificate_error("sign the serving certificate"))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).map_err(|error| tls("trust the own CA")(&error))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(|error| tls("set up client certificates")(&error))?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| tls("set up TLS")(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.der().clone(), self.certificate.clone()], key)
            .map_err(|error| tls("use the serving certificate")(&error))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}
