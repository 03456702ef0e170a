/** tcpdump on an interface of a Network: what it makes of the frames there, checksums included. */
import type { Network } from "./network.ts";
import type { Program } from "./program.ts";

/** How tcpdump says, with -vv, that a checksum or a length of a frame is wrong. */
const WRONG = /incorrect|bad |wrong |truncated|invalid|\[\|/;

export class Capture implements AsyncDisposable {
  readonly #program: Program;

  /** Resolves when it sees frames. @param filter see pcap-filter(7) */
  static async start(network: Network, name: string, filter = ""): Promise<Capture> {
    const options = "-Z root -l --immediate-mode -nn -e -vv -s 0 -B 16384".split(" ");
    const capture = new Capture(network.start("tcpdump", ["tcpdump", ...options, "-i", name, filter]));
    try {
      await capture.#program.until("its first frame to come", () =>
        capture.#program.output.includes("listening on") ? true : undefined,
      );
      return capture;
    } catch (error) {
      await capture[Symbol.asyncDispose]();
      throw error;
    }
  }

  private constructor(program: Program) {
    this.#program = program;
  }

  /** What it says of each frame so far: one text a frame, of one line or several. */
  get frames(): string[] {
    // a frame's first line begins with a time, the others with blanks
    return this.#program.stdout.split(/\n(?=\d\d:)/).filter((text) => text !== "");
  }

  /** Frames with something wrong in them. */
  get wrong(): string[] {
    return this.frames.filter((text) => WRONG.test(text));
  }

  /** Resolves when there are so many frames in which this text occurs; it may be a while before tcpdump prints them. */
  async until(count: number, text: string): Promise<void> {
    await this.#program.until(`${count} frames with "${text}"`, () => {
      return this.frames.filter((frame) => frame.includes(text)).length >= count || undefined;
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program.kill();
  }
}
