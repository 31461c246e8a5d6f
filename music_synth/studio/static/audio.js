// The audio side of the page: one AudioWorklet at the rate of the samples.
export const RATE = 16000;

export class Audio {
  constructor(on) {
    this.on = on; // called with the worklet's messages
    this.state = { head: 0, buffered: 0, underruns: 0, live: 0, seen: 0 };
    this.waiting = [];
  }

  // Browsers start audio only in answer to a key or a click, so the context is made then.
  async open() {
    if (!this.opening) this.opening = this.make();
    await this.opening;
    if (this.context.state !== "running") await this.context.resume();
  }

  async make() {
    this.context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    await this.context.audioWorklet.addModule("worklet.js");
    this.node = new AudioWorkletNode(this.context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.gain = new GainNode(this.context);
    this.node.connect(this.gain).connect(this.context.destination);
    this.node.port.onmessage = ({ data }) => {
      if (data.type === "report") this.state = { ...data, seen: performance.now() };
      this.on(data);
    };
    for (const [message, transfer] of this.waiting) this.node.port.postMessage(message, transfer);
    this.waiting = [];
  }

  post(message, transfer = []) {
    if (this.node) this.node.port.postMessage(message, transfer);
    else this.waiting.push([message, transfer]);
  }

  // When a frame of the context leaves the loudspeaker, in milliseconds of performance.now().
  timeOf(frame) {
    const stamp = this.context.getOutputTimestamp ? this.context.getOutputTimestamp() : null;
    const seconds = frame / RATE;
    if (stamp && stamp.performanceTime > 0) return stamp.performanceTime + (seconds - stamp.contextTime) * 1000;
    const latency = this.context.outputLatency || this.context.baseLatency || 0;
    return performance.now() + (seconds - this.context.currentTime + latency) * 1000;
  }

  // Where the live ring is played now.
  livePosition() {
    return Math.round(this.state.live + ((performance.now() - this.state.seen) / 1000) * RATE);
  }
}
