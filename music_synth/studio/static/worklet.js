// Plays voices from rings of int16 samples at 16 kHz; one of them is heard. Live audio is added.
const RING = 1 << 20; // samples, 65 s: more than the server makes ahead
const LIVE_RING = 1 << 17;
const FADE = 160; // samples, 10 ms, over which one sound becomes another

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.head = 0; // sample of the piece that is played next
    this.voices = new Map();
    this.selected = 0;
    this.playing = false;
    this.underruns = 0;
    this.starving = false;
    this.fading = null; // what was to be heard next, before it was replaced
    this.faded = 0;
    this.marks = []; // jobs whose first sample is not heard yet
    this.live = null;
    this.tap = false;
    this.quanta = 0;
    this.port.onmessage = ({ data }) => this[data.type](data);
  }

  // --- messages ---

  job({ job, at, keep, voices }) {
    if (!keep) {
      this.voices.clear();
      this.head = at;
      this.starving = false;
      this.fading = null;
    }
    for (const number of [...this.voices.keys()]) if (number >= voices) this.voices.delete(number);
    for (const track of this.voices.values()) track.fresh = true;
    this.jobNumber = job;
    this.marks = this.playing ? [job] : [];
  }

  pcm({ job, voice, position, samples }) {
    if (job !== this.jobNumber) return;
    let track = this.voices.get(voice);
    if (!track) {
      track = { ring: new Int16Array(RING), start: 0, end: 0, last: Infinity, fresh: true };
      this.voices.set(voice, track);
    }
    const end = position + samples.length;
    if (end <= this.head) return; // a part of the segment that is over
    const from = Math.max(position, this.head);
    if (track.fresh) {
      if (voice === this.selected) this.startFade();
      track.fresh = false;
      track.start = from;
      track.last = Infinity;
      track.job = job;
    }
    for (let i = from; i < end; i++) track.ring[i % RING] = samples[i - position];
    track.end = end;
  }

  end({ job, voice, at }) {
    if (job !== this.jobNumber) return;
    let track = this.voices.get(voice);
    if (!track) {
      track = { ring: new Int16Array(RING), start: at, end: at };
      this.voices.set(voice, track);
    } else if (track.fresh) {
      if (voice === this.selected) this.startFade();
      track.start = track.end = at;
    }
    track.fresh = false;
    track.job = job;
    track.last = track.end;
  }

  select({ voice }) {
    if (voice !== this.selected) this.startFade();
    this.selected = voice;
  }

  play({ on, total }) {
    this.playing = on;
    this.total = total;
    this.starving = false;
    if (!on) this.marks = [];
  }

  reset() {
    this.underruns = 0;
  }

  tapping({ on }) {
    this.tap = on;
  }

  liveOn({ on }) {
    this.live = on ? { ring: new Int16Array(LIVE_RING), head: 0, end: 0, fading: null, faded: 0, keys: [] } : null;
  }

  liveBlock({ position, samples, keys }) {
    const live = this.live;
    if (!live) return;
    const from = Math.max(position, live.head);
    const end = position + samples.length;
    if (end > from) {
      if (live.end > from) {
        live.fading = new Float32Array(FADE);
        for (let i = 0; i < FADE; i++) live.fading[i] = from + i < live.end ? live.ring[(from + i) % LIVE_RING] / 32768 : 0;
        live.fadeFrom = from;
      }
      for (let i = from; i < end; i++) live.ring[i % LIVE_RING] = samples[i - position];
      for (let i = live.end; i < from; i++) live.ring[i % LIVE_RING] = 0;
      live.end = end;
    }
    for (const key of keys) live.keys.push({ number: key, at: from });
  }

  // --- sound ---

  sampleAt(track, at) {
    return track && at >= track.start && at < track.end ? track.ring[at % RING] / 32768 : 0;
  }

  startFade() {
    const track = this.voices.get(this.selected);
    if (!this.playing || !track || this.head < track.start || this.head >= track.end) return; // nothing to fade from
    const old = new Float32Array(FADE);
    for (let i = 0; i < FADE; i++) old[i] = this.sampleAt(track, this.head + i);
    this.fading = old;
    this.faded = 0;
  }

  process(_, [[out]]) {
    const track = this.voices.get(this.selected);
    let played = 0;
    if (this.playing) {
      for (let i = 0; i < out.length; i++) {
        const there = track && this.head >= track.start && this.head < track.end;
        if (!there && !(track && this.head >= track.last)) break;
        let value = there ? track.ring[this.head % RING] / 32768 : 0;
        if (this.fading) {
          const share = this.faded / FADE;
          value = share * value + (1 - share) * this.fading[this.faded];
          if (++this.faded === FADE) this.fading = null;
        }
        out[i] = value;
        this.head++;
        played++;
        if (this.head >= this.total) break;
      }
      if (played && this.marks.length && track.job === this.marks[0]) {
        this.port.postMessage({ type: "heard", job: this.marks.shift(), frame: currentFrame });
      }
      if (this.head >= this.total) {
        this.playing = false;
        this.port.postMessage({ type: "finished", job: this.jobNumber });
      } else if (played < out.length) {
        if (!this.starving && this.hasPlayed) this.underruns++;
        this.starving = true;
      } else {
        this.starving = false;
        this.hasPlayed = true;
      }
    } else {
      this.hasPlayed = false;
    }
    if (this.tap && played) this.port.postMessage({ type: "tapped", samples: out.slice(0, played) });
    if (this.live) this.playLive(out);
    if (++this.quanta % 4 === 0) this.report(track);
    return true;
  }

  playLive(out) {
    const live = this.live;
    for (let i = 0; i < out.length; i++, live.head++) {
      let value = live.head < live.end ? live.ring[live.head % LIVE_RING] / 32768 : 0;
      if (live.fading && live.head >= live.fadeFrom) {
        const place = live.head - live.fadeFrom;
        if (place < FADE) value = (place / FADE) * value + (1 - place / FADE) * live.fading[place];
        else live.fading = null;
      }
      out[i] += value;
    }
    while (live.keys.length && live.keys[0].at < live.head) {
      const key = live.keys.shift();
      this.port.postMessage({ type: "sounded", number: key.number, frame: currentFrame + out.length - (live.head - key.at) });
    }
  }

  report(track) {
    this.port.postMessage({
      type: "report",
      job: this.jobNumber,
      head: this.head,
      buffered: track ? Math.max(0, Math.min(track.last, track.end) - this.head) : 0,
      underruns: this.underruns,
      starving: this.starving,
      live: this.live ? this.live.head : 0,
      frame: currentFrame,
    });
  }
}

registerProcessor("player", Player);
