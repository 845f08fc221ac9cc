//! What every object of kernel programs must hold: a panic handler and its licence.

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// The kernel offers the helpers that read its memory only under a licence it calls GPL-compatible; MIT,
// one of ours, is on its list by this name.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
