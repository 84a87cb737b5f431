//! The certificates that servers show, as whoever watches a sign-in wants to see them: also those that are refused.
//!
//! A client that records ([`super::HttpClients::recording`]) decides as every other one does, by the same verifier; it
//! only notes what was decided about whom.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use rustls_platform_verifier::Verifier;
use x509_parser::extensions::GeneralName;

use super::error::printable;

/// Longest name that is shown, in characters.
const NAME: usize = 120;
/// How many of a certificate's names are shown.
const NAMES: usize = 10;

/// A certificate that a server showed, and what was made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownCertificate {
    /// The name or address that was asked for.
    pub server: String,
    /// Whose it is; a note that it can't be read otherwise.
    pub subject: String,
    /// Who signed it.
    pub issuer: String,
    /// The host names it is for, at most ten.
    pub names: Vec<String>,
    /// When it ends.
    pub expires_at: Option<Timestamp>,
    /// Why it is not trusted; `None` if it is.
    pub refused: Option<String>,
}

/// What servers have shown, each of them once for each verdict, in order. Its clones are one.
#[derive(Debug, Clone, Default)]
pub struct CertificateLog {
    shown: Arc<Mutex<Vec<ShownCertificate>>>,
}

impl CertificateLog {
    /// All so far.
    pub fn shown(&self) -> Vec<ShownCertificate> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, certificate: ShownCertificate) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if !shown.contains(&certificate) {
            shown.push(certificate);
        }
    }

    /// TLS that notes here whom it trusts. `extra_ca_pem` are authorities beside the system's.
    ///
    /// # Errors
    /// If there is no authority at all, or one can't be used.
    pub(super) fn tls(
        &self,
        extra_ca_pem: Option<&[u8]>,
        protocols: &[&[u8]],
    ) -> Result<ClientConfig, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let authorities: Vec<CertificateDer<'static>> =
            CertificateDer::pem_slice_iter(extra_ca_pem.unwrap_or_default())
                .collect::<Result<_, _>>()
                .map_err(|problem| Error::General(format!("server.ca_file can't be read: {problem}")))?;
        let inner = if authorities.is_empty() {
            Verifier::new(Arc::clone(&provider))?
        } else {
            Verifier::new_with_extra_roots(authorities, Arc::clone(&provider))?
        };
        let verifier = Arc::new(Recording { inner, log: self.clone() });
        let mut tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        tls.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(tls)
    }
}

/// The platform's verifier, with notes.
struct Recording {
    inner: Verifier,
    log: CertificateLog,
}

impl fmt::Debug for Recording {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Recording(..)")
    }
}

impl ServerCertVerifier for Recording {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verdict =
            self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        let mut certificate = read(&server_name.to_str(), end_entity);
        certificate.refused = verdict.as_ref().err().map(ToString::to_string);
        self.log.note(certificate);
        verdict
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

fn read(server: &str, der: &[u8]) -> ShownCertificate {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(der) else {
        return ShownCertificate {
            server: server.to_owned(),
            subject: "a certificate that can't be read".to_owned(),
            issuer: String::new(),
            names: Vec::new(),
            expires_at: None,
            refused: None,
        };
    };
    let names = certificate.subject_alternative_name().ok().flatten().map(|extension| {
        let names = extension.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(printable(name, NAME)),
            GeneralName::IPAddress(bytes) => address(bytes),
            _ => None,
        });
        names.take(NAMES).collect()
    });
    ShownCertificate {
        server: server.to_owned(),
        subject: printable(&certificate.subject().to_string(), NAME),
        issuer: printable(&certificate.issuer().to_string(), NAME),
        names: names.unwrap_or_default(),
        expires_at: Timestamp::from_second(certificate.validity().not_after.timestamp()).ok(),
        refused: None,
    }
}

/// An IP address as certificates hold it.
fn address(bytes: &[u8]) -> Option<String> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(std::net::Ipv4Addr::from(v4).to_string());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| std::net::Ipv6Addr::from(v6).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_told_with_its_names_and_its_end() {
        let names = ["pool.contoso.test".to_owned(), "127.0.0.1".to_owned()];
        let made = rcgen::generate_simple_self_signed(names.clone()).unwrap();
        let shown = read("pool.contoso.test", made.cert.der());
        assert_eq!(shown.names, names);
        assert_eq!(shown.subject, shown.issuer, "it signed itself");
        assert!(shown.expires_at.unwrap() > Timestamp::now());
        assert_eq!(read("x", b"no certificate").subject, "a certificate that can't be read");
    }
}
