// Requests to this server. Addresses are relative: a proxy may have put it under a path.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The answer's body; an ApiError with the server's own words for any other status. */
export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  // The session is over: only a login helps, and only where the page has one.
  if (answer.status === 401) location.assign("dashboard/login");
  let message = text || `${answer.status} ${answer.statusText}`;
  try {
    message = JSON.parse(text).error.message;
  } catch { /* no error of the API: shown as it is */ }
  throw new ApiError(answer.status, message);
}

export const get = async (path) => (await ask(path)).json();

export const post = async (path, body) =>
  (await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  })).json();

/** The data of server-sent events, one by one, up to "[DONE]". */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((each) => each.startsWith("data: "));
      if (!line) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}
