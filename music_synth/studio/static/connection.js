// The WebSocket: comes back by itself, and takes frames apart.
export const PCM = 1;
export const MEL = 2;
export const LIVE = 3;

export class Connection {
  constructor(handlers) {
    this.handlers = handlers; // open, closed, message(object), frame({kind, voice, flags, job, position, data})
    this.pause = 250;
    this.connect();
  }

  connect() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/socket`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => {
      this.pause = 250;
      this.handlers.open();
    };
    this.socket.onclose = () => {
      this.handlers.closed();
      setTimeout(() => this.connect(), this.pause);
      this.pause = Math.min(this.pause * 2, 4000);
    };
    this.socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.handlers.message(JSON.parse(data));
      else this.handlers.frame(unpack(data));
    };
  }

  send(message) {
    if (this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }
}

function unpack(buffer) {
  const head = new DataView(buffer);
  const kind = head.getUint8(0);
  const frame = {
    kind,
    voice: head.getUint8(1),
    flags: head.getUint16(2, true),
    job: head.getUint32(4, true),
    position: head.getUint32(8, true),
  };
  frame.data = kind === MEL ? new Uint8Array(buffer, 16) : new Int16Array(buffer, 16);
  return frame;
}
