//! The user in a client certificate's subject: just enough DER to find common name and organisations.
//!
//! The chain has been verified by rustls before; this only reads names.

use super::UserInfo;

const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const ORGANIZATION: &[u8] = &[0x55, 0x04, 0x0a];
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const CONTEXT_0: u8 = 0xa0;

/// Splits the first element off: tag, content, rest.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let bytes = usize::from(first & 0x7f);
        if bytes == 0 || bytes > 4 {
            return None;
        }
        let (length, rest) = rest.split_at_checked(bytes)?;
        (length.iter().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte)), rest)
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

fn expect(der: &[u8], wanted: u8) -> Option<(&[u8], &[u8])> {
    let (tag, content, rest) = element(der)?;
    (tag == wanted).then_some((content, rest))
}

/// Common name → user, organisations → groups. None when there is no common name.
pub(crate) fn certificate_user(der: &[u8]) -> Option<UserInfo> {
    let (certificate, _) = expect(der, SEQUENCE)?;
    let (body, _) = expect(certificate, SEQUENCE)?;
    let (tag, _, after_version) = element(body)?;
    let body = if tag == CONTEXT_0 { after_version } else { body };
    let (_, _, body) = element(body)?; // serial number
    let (_, _, body) = element(body)?; // signature algorithm
    let (_, _, body) = element(body)?; // issuer
    let (_, _, body) = element(body)?; // validity
    let (mut subject, _) = expect(body, SEQUENCE)?;
    let mut user = UserInfo::default();
    while !subject.is_empty() {
        let (mut names, rest) = expect(subject, SET)?;
        subject = rest;
        while !names.is_empty() {
            let (name, rest) = expect(names, SEQUENCE)?;
            names = rest;
            let (kind, value) = expect(name, OBJECT_IDENTIFIER)?;
            let (_, text, _) = element(value)?;
            let text = String::from_utf8_lossy(text).into_owned();
            match kind {
                COMMON_NAME => user.name = text,
                ORGANIZATION => user.groups.push(text),
                _ => {}
            }
        }
    }
    (!user.name.is_empty()).then_some(user)
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;

    use super::certificate_user;
    use crate::tls::Authority;

    #[test]
    fn the_subject_of_a_client_certificate_is_the_user() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path()).unwrap();
        let client = authority.client("system:node:n1", &["system:nodes", "b"]).unwrap();
        let der = CertificateDer::from_pem_slice(client.certificate_pem.as_bytes()).unwrap();
        let user = certificate_user(&der).unwrap();
        assert_eq!(user.name, "system:node:n1");
        assert_eq!(user.groups, ["system:nodes", "b"]);
    }

    #[test]
    fn truncated_certificates_name_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let client = Authority::open(dir.path()).unwrap().client("a", &["b"]).unwrap();
        let der = CertificateDer::from_pem_slice(client.certificate_pem.as_bytes()).unwrap();
        for length in 0..der.len() {
            assert!(certificate_user(&der[..length]).is_none());
        }
    }
}
