//! Memory of this process: as much as it holds, and not as much as it ever held.

/// Arenas that threads share. One a thread would be faster for who allocates all the time; this process does so in bursts, and what one
/// arena has free no other can use.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 2;
/// From this size on, in bytes, an allocation is a mapping of its own and goes back to the kernel when it is freed. Unless it is set the
/// allocator raises it to the size of whatever was freed, up to 32 MiB.
#[cfg(target_env = "gnu")]
const OWN_MAPPING: libc::c_int = 256 * 1024;

/// Has the allocator share and give back. To be called before there are threads: an arena that is there stays.
pub fn be_frugal() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes no pointer; no other thread runs yet that could allocate meanwhile (mallopt(3)). What it cannot set stays as it is.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, ARENAS);
            libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING);
        }
    }
}

/// Gives free memory back to the kernel. The allocator keeps what was freed, in case it is asked for again; after lists of all objects were
/// read that is most of what it holds, and is not asked for again before the next list.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes no pointer, and is safe beside other threads that allocate (MT-Safe, malloc_trim(3)).
        unsafe { libc::malloc_trim(0) };
    }
}
