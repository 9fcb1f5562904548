//! The messages between `push` and the daemon over a Unix socket: one line of JSON in each
//! direction. The request also passes the open files (`SCM_RIGHTS`), so that the daemon needs no
//! permission to read the data directory.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

/// The maximum number of files in a request: the pushed file and those that wait after it.
pub const FILES_MAX: usize = 9;
/// The maximum length of a request in bytes, more than the longest names need.
const LINE_BYTES_MAX: usize = 64 << 10;

/// A request. The first file is needed now, the others next.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Absolute paths as PostgreSQL names them, in the order of the descriptors.
    pub paths: Vec<PathBuf>,
}

/// The answer about the first file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The file is in the repository and was read back.
    Archived,
    /// The file is not in the repository.
    Failed {
        /// The reason.
        problem: String,
    },
}

/// Sends a request with its files.
///
/// # Errors
/// When the daemon has closed the connection.
pub fn send_request(
    socket: &mut UnixStream,
    request: &Request,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::Error::other("too many files"));
    }
    let parts = [IoSlice::new(&line)];
    let sent = sendmsg(socket.as_fd(), &parts, &mut control, SendFlags::NOSIGNAL)?;
    socket.write_all(line.get(sent..).unwrap_or_default())
}

/// Receives a client's request with its files.
///
/// # Errors
/// When it is not a request that this build understands.
pub fn receive_request(socket: &mut UnixStream) -> io::Result<(Request, Vec<File>)> {
    let mut line = Vec::new();
    let mut files = Vec::new();
    let mut buffer = vec![0; 4096];
    while line.last() != Some(&b'\n') {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received = recvmsg(
            socket.as_fd(),
            &mut parts,
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                files.extend(descriptors.map(File::from));
            }
        }
        if received.bytes == 0 || line.len() > LINE_BYTES_MAX {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(buffer.get(..received.bytes).unwrap_or_default());
    }
    let request: Request = serde_json::from_slice(&line)?;
    if request.paths.is_empty() || request.paths.len() != files.len() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((request, files))
}

/// Sends an answer.
///
/// # Errors
/// When the client has closed the connection.
pub fn send_answer(socket: &mut UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    socket.write_all(&line)
}

/// Receives the daemon's answer.
///
/// # Errors
/// When the daemon ended before it answered, or sent an answer that this build does not understand.
pub fn receive_answer(socket: &UnixStream) -> io::Result<Answer> {
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}
