//! Who is at the other end of a connection within this machine: the kernel knows whose socket it is. Through a tunnel it
//! is the user as whom the tunnel's program runs, so with `ssh -L` the person who signed in by ssh.

use std::net::SocketAddr;

use crate::system_user;

/// The user whose socket `peer` is; `None` if it is not on this machine or the system does not tell.
pub(super) fn name(peer: SocketAddr) -> Option<String> {
    let address = peer.ip().to_canonical();
    if !address.is_loopback() {
        return None;
    }
    // Also there where the service sees no more of /proc than processes (`ProcSubset=pid`).
    let table = if peer.is_ipv4() { "/proc/self/net/tcp" } else { "/proc/self/net/tcp6" };
    let uid = owner_in(&std::fs::read_to_string(table).ok()?, peer)?;
    Some(system_user::name_of(uid))
}

/// The owner of the socket with this local address, from the kernel's table (proc(5)).
fn owner_in(table: &str, address: SocketAddr) -> Option<u32> {
    let wanted = in_hexadecimal(address);
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_whitespace();
        let local = fields.nth(1)?;
        local.eq_ignore_ascii_case(&wanted).then(|| fields.nth(5)?.parse().ok())?
    })
}

/// As the table spells it: each 32-bit word of the address in the byte order of the machine.
fn in_hexadecimal(address: SocketAddr) -> String {
    let word = |bytes: &[u8]| {
        let bytes: [u8; 4] = bytes.try_into().expect("an address has whole words");
        format!("{:08X}", u32::from_ne_bytes(bytes))
    };
    let words: String = match address {
        SocketAddr::V4(address) => word(&address.ip().octets()),
        SocketAddr::V6(address) => address.ip().octets().chunks(4).map(word).collect(),
    };
    format!("{words}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_kernel_tells_whose_connection_it_is() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(name(peer), Some(system_user::current()), "{address}");
            drop(client);
        }
        assert_eq!(name("192.0.2.1:80".parse().unwrap()), None);
    }
}
