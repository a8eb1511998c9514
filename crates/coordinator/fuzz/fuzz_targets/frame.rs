//! Bytes from the other end of a control link → frames, handshakes of both sides, a session. Nothing may panic, hang, or
//! allocate more than arrived.

#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use longshore::link::{
    frame::{FRAME_MAX, FrameCodec},
    handshake::{Credentials, Purpose, Terms, admit, join},
    session::{self, Beat, Packet, Timing},
    wire,
};
use tokio::{io, runtime, sync::mpsc};
use tokio_util::codec::Decoder;

/// A message with something of everything that postcard has a form for.
type Message = (u64, String, Vec<Option<(bool, i32)>>, Result<Purpose, Vec<u8>>);

fuzz_target!(|data: &[u8]| {
    let Some((&which, data)) = data.split_first() else { return };
    let runtime = runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    match which % 4 {
        0 => frames(data),
        1 => runtime.block_on(async {
            let mut stream = io::join(data, io::sink());
            assert!(admit(&mut stream, &Terms::new(None, 4, 0)).await.is_err());
        }),
        2 => runtime.block_on(async {
            let mut stream = io::join(data, io::sink());
            let credentials = Credentials::new(None, 0, 4, 0, Purpose::Control);
            assert!(join(&mut stream, &credentials).await.is_err());
        }),
        _ => runtime.block_on(async {
            let stream = io::join(data, io::sink());
            let (_open, outgoing) = mpsc::channel::<Message>(1);
            let take = |_: Message| Ok(());
            let _ = session::run(stream, outgoing, take, Beat::default, |_| {}, Timing::default())
                .await;
        }),
    }
});

fn frames(data: &[u8]) {
    let mut received = BytesMut::from(data);
    let capacity = received.capacity();
    let mut codec = FrameCodec::new(FRAME_MAX);
    while let Ok(Some(frame)) = codec.decode_eof(&mut received) {
        if let Ok(packet) = wire::decode::<Packet<Message>>(&frame) {
            let again = wire::encode(&packet).expect("what was decoded can be encoded");
            assert!(again.len() <= frame.len(), "postcard's own form is the shortest");
        }
    }
    assert!(received.capacity() <= capacity, "nothing is reserved");
}
