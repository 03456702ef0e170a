/**
 * The errors of vhost-relay: a small tree with stable codes, each with one stated recovery.
 *
 * Recovery is decided by class, never by message text:
 *
 * | class         | who is at fault         | recovery                                |
 * |---------------|-------------------------|-----------------------------------------|
 * | ConfigError   | the user's command line | exit status 2                           |
 * | SystemError   | the host (errno)        | the operation failed; state unchanged   |
 * | ProtocolError | the front-end           | refuse the message or drop the connection |
 */

export abstract class RelayError extends Error {
  /** Stable, machine-readable; never reworded. */
  abstract readonly code: string;
  override get name(): string {
    return this.constructor.name;
  }
}

/** A wrong option or combination of options. */
export class ConfigError extends RelayError {
  readonly code = "CONFIG";
}

/** A system call failed. `code` is the errno's name (`ENOMEM`, ...). */
export class SystemError extends RelayError {
  readonly code: string;
  readonly syscall: string;
  readonly errno: number;

  /** @param context what was attempted, with values; the likely cause and fix may follow after a semicolon */
  constructor(syscall: string, errno: number, code: string, context: string) {
    super(`${context}: ${syscall}: ${code}`);
    this.syscall = syscall;
    this.errno = errno;
    this.code = code;
  }
}

/**
 * The front-end broke the vhost-user protocol.
 * `nack`: refuse this message and go on; `drop`: close the connection, keep serving others.
 */
export class ProtocolError extends RelayError {
  readonly code = "PROTOCOL";
  readonly recovery: "nack" | "drop";

  constructor(message: string, recovery: "nack" | "drop" = "nack") {
    super(message);
    this.recovery = recovery;
  }
}
