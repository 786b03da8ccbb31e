//! Memory of this process.

/// Gives free memory back to the kernel. The allocator keeps what was freed, in case it is asked for again; after lists of all objects were
/// read that is most of what it holds, and is not asked for again before the next list.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: takes no pointer, and is safe beside other threads that allocate (MT-Safe, malloc_trim(3)).
        unsafe { libc::malloc_trim(0) };
    }
}
