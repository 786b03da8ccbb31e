//! The `bpf` calls of one thread, each held up before the kernel makes it: what traffic meets between two writes, and what a process
//! that is killed there leaves behind.
//!
//! By seccomp's user notification, so that it is the very calls of the code under test, and nothing in it knows. A call that writes many entries is made
//! entry by entry if that is wanted: a packet on another CPU may come between two of them, though no signal can.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use libbpf_rs::libbpf_sys;

/// What becomes of a held up call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It is made.
    Made,
    /// Neither it nor any later one is: as if the process had been killed.
    Killed,
}

/// In how many pieces a call that writes many entries is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pieces {
    Whole,
    Entries,
}

/// How long the listener is waited on before it is asked whether the thread still runs.
const LOOK: Duration = Duration::from_millis(2);

/// `union bpf_attr` of a call about one entry.
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` of a call about many.
#[repr(C)]
struct Batch {
    cursors: [u64; 2],
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// From now on every `bpf` call of the calling thread waits for whoever has the returned listener.
pub fn hold_up_this_thread() -> OwnedFd {
    let step = |code: u32, jt: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf: 0, k };
    // The number of the call is the first word of `struct seccomp_data`.
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, libc::SYS_bpf as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_USER_NOTIF),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and its steps outlive the call, which copies them.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    assert!(listener >= 0, "seccomp: {}", io::Error::last_os_error());
    // SAFETY: the kernel just made this descriptor for us, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(listener as i32) }
}

/// A map's name and the sizes of its keys and values.
fn map_of(fd: u32) -> (String, usize, usize) {
    let mut info = libbpf_sys::bpf_map_info::default();
    let mut size = size_of_val(&info) as u32;
    // SAFETY: the descriptor is the held up thread's, which is one of this process and waits; `info` is as large as said.
    let ret = unsafe { libbpf_sys::bpf_map_get_info_by_fd(fd as i32, &raw mut info, &raw mut size) };
    assert_eq!(ret, 0, "{}", io::Error::last_os_error());
    let name: Vec<u8> = info.name.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
    (String::from_utf8(name).unwrap(), info.key_size as usize, info.value_size as usize)
}

/// Makes a held up write of many entries one by one. 0, or the errno of the entry that failed or was not made any more.
fn one_by_one(batch: &mut Batch, mut each: impl FnMut(&str) -> Then) -> i32 {
    let (name, key_size, value_size) = map_of(batch.map);
    for at in 0..batch.count {
        let what = format!("write entry {at} of {} of {name}", batch.count);
        if each(&what) == Then::Killed {
            batch.count = at;
            return libc::EIO;
        }
        let at_index = |from: u64, size: usize| (from + u64::from(at) * size as u64) as *const libc::c_void;
        // SAFETY: the waiting thread's arrays hold `count` entries of the map's sizes, and are left alone while it waits.
        let ret = unsafe {
            let (key, value) = (at_index(batch.keys, key_size), at_index(batch.values, value_size));
            libbpf_sys::bpf_map_update_elem(batch.map as i32, key, value, batch.element_flags)
        };
        if ret < 0 {
            batch.count = at;
            return -ret;
        }
    }
    0
}

/// Attends a thread that is held up until it is over; `each` is asked before every change that it makes to a map, and before every program that
/// it runs. How many it was asked about.
pub fn attend(
    listener: &OwnedFd,
    over: impl Fn() -> bool,
    pieces: Pieces,
    mut each: impl FnMut(&str) -> Then,
) -> usize {
    let (mut asked, mut killed) = (0, false);
    loop {
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor is told of, and it is open.
        unsafe { libc::poll(&raw mut poll, 1, LOOK.as_millis() as i32) };
        if poll.revents & libc::POLLIN == 0 {
            if over() || poll.revents & libc::POLLHUP != 0 {
                return asked;
            }
            continue;
        }
        // SAFETY: all zero is a value of it, and what the kernel asks for.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one such structure.
        let got = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) };
        assert_eq!(got, 0, "{}", io::Error::last_os_error());
        let dead = killed;
        let mut ask = |what: &str| {
            asked += 1;
            killed |= each(what) == Then::Killed;
            if killed { Then::Killed } else { Then::Made }
        };
        let [command, attribute, ..] = call.data.args;
        let go_on = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        // Of a process that is dead nothing reaches the kernel, reads neither.
        let (error, flags) =
            if dead { (libc::EIO, 0) } else { answer(command as u32, attribute, pieces, &mut ask, go_on) };
        let answer = libc::seccomp_notif_resp { id: call.id, val: 0, error: -error, flags };
        // SAFETY: the kernel reads one such structure.
        let sent = unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
        assert_eq!(sent, 0, "{}", io::Error::last_os_error());
    }
}

/// What to answer a call with: an errno, or that the kernel goes on with it.
fn answer(command: u32, attribute: u64, pieces: Pieces, ask: &mut impl FnMut(&str) -> Then, go_on: u32) -> (i32, u32) {
    let what = match command {
        libbpf_sys::BPF_MAP_UPDATE_BATCH => {
            // SAFETY: the waiting thread is one of this process, so its address is good here, and it is a batch call's attribute.
            let batch = unsafe { &mut *(attribute as *mut Batch) };
            if pieces == Pieces::Entries {
                return (one_by_one(batch, ask), 0);
            }
            format!("write {} entries of {}", batch.count, map_of(batch.map).0)
        }
        libbpf_sys::BPF_MAP_UPDATE_ELEM | libbpf_sys::BPF_MAP_DELETE_ELEM => {
            // SAFETY: as above, and it is a call about one entry.
            let element = unsafe { &*(attribute as *const Element) };
            let verb = if command == libbpf_sys::BPF_MAP_DELETE_ELEM { "delete from" } else { "write" };
            format!("{verb} {}", map_of(element.map).0)
        }
        libbpf_sys::BPF_PROG_TEST_RUN => "run a program".to_owned(),
        _ => return (0, go_on),
    };
    match ask(&what) {
        Then::Made => (0, go_on),
        Then::Killed => (libc::EIO, 0),
    }
}
