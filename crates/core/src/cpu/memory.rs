//! Large pages: fewer addresses have to be looked up where much memory is read once.

/// Bytes of a large page on x86-64, and on aarch64 with small pages of 4 KiB.
pub(crate) const LARGE_PAGE: usize = 2 << 20;

/// Asks the system for large pages behind memory of more than one of them that nobody has touched yet. Where it has none
/// to give, or knows no such advice, the memory is as before.
pub(crate) fn prefer_large_pages(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        let skipped = start.align_offset(LARGE_PAGE);
        if skipped.saturating_add(LARGE_PAGE) <= bytes {
            // SAFETY: the range lies inside of the caller's memory and starts on a page; the advice changes no contents.
            unsafe { libc::madvise(start.add(skipped).cast(), bytes - skipped, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}
