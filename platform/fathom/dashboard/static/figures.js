// What two readings of /metrics say of the time between them.

import { increase, increases, quantile, ratio, samples, total } from "./metrics.js";

const SERVED = "fathom_generation_tokens_total";
const MADE = "fathom_replica_generation_tokens_total";

/**
 * The figures of one moment.
 *
 * readings: [{at (ms), reading}], oldest first, the last one of now.
 * spans: how many seconds back rates and quantiles look. Rates are of [0, 1], times in seconds; null
 * is what nothing tells of in that time.
 */
export function figures(readings, spans = { rate: 5, quantile: 30 }) {
  const now = readings.at(-1);
  const back = (seconds) =>
    readings.findLast((each) => now.at - each.at >= 1000 * seconds - 250) ?? readings[0];
  const near = back(spans.rate), far = back(spans.quantile);
  const seconds = (now.at - near.at) / 1000;
  const grown = (name) => increase(near.reading, now.reading, name);
  const rate = (name) => (seconds > 0 ? grown(name) / seconds : null);
  const share = (upper, lower) => ratio(near.reading, now.reading, upper, lower);
  const within = (name, q) => quantile(far.reading, now.reading, name, q);
  return {
    at: now.at,
    tokens: rate(SERVED),
    prompts: rate("fathom_prompt_tokens_total"),
    ttft50: within("fathom_time_to_first_token_seconds", 0.5),
    ttft95: within("fathom_time_to_first_token_seconds", 0.95),
    tpot50: within("fathom_inter_token_latency_seconds", 0.5),
    tpot95: within("fathom_inter_token_latency_seconds", 0.95),
    exits: share("fathom_exited_tokens_total", MADE),
    accepted: share("fathom_drafts_accepted_total", "fathom_drafts_verified_total"),
    layers: share("fathom_layer_executions_total", MADE),
    stored: rate("fathom_kv_store_hits_total"),
    cached: share("fathom_prefix_cache_hits_total", "fathom_prefix_cache_queries_total"),
    running: total(now.reading, "fathom_num_requests_running"),
    waiting: total(now.reading, "fathom_num_requests_waiting"),
    kv: Math.max(0, ...samples(now.reading, "fathom_kv_cache_usage_perc").map((each) => each.value)),
    replicas: total(now.reading, "fathom_replicas"),
    thresholds: thresholds(now.reading),
  };
}

/** The same ratios since the engines started, for when nothing runs. */
export function lifetime(reading) {
  const of = (upper, lower) => {
    const below = total(reading, lower);
    return below ? total(reading, upper) / below : null;
  };
  return {
    exits: of("fathom_exited_tokens_total", MADE),
    accepted: of("fathom_drafts_accepted_total", "fathom_drafts_verified_total"),
    layers: of("fathom_layer_executions_total", MADE),
    cached: of("fathom_prefix_cache_hits_total", "fathom_prefix_cache_queries_total"),
    stored: total(reading, "fathom_kv_store_hits_total"),
    tokens: total(reading, SERVED),
  };
}

/** λ by "policy confidence", mean of the replicas. */
function thresholds(reading) {
  const found = {};
  for (const { labels, value } of samples(reading, "fathom_exit_threshold"))
    (found[`${labels.policy} ${labels.confidence}`] ??= []).push(value);
  return Object.fromEntries(Object.entries(found).map(([name, all]) => [name, all.reduce((a, b) => a + b) / all.length]));
}

/** One line a replica, by its name. */
export function byReplica(before, after, seconds) {
  const found = new Map();
  const put = (key, entries) => {
    for (const { labels, value } of entries) {
      if (!labels.replica) continue;
      if (!found.has(labels.replica)) found.set(labels.replica, { replica: labels.replica });
      const own = found.get(labels.replica);
      own[key] = (own[key] ?? 0) + value;
    }
  };
  const gauges = {
    running: "num_requests_running", waiting: "num_requests_waiting", kv: "kv_cache_usage_perc",
    exits: "exit_rate", layers: "layers_per_token", accepted: "acceptance_rate",
    flush: "flush_seconds", queue: "flush_queue_seconds", deep: "deep_pass_seconds",
  };
  for (const [key, name] of Object.entries(gauges)) put(key, samples(after, `fathom_${name}`));
  put("made", increases(before, after, MADE));
  for (const own of found.values()) own.rate = seconds > 0 && own.made !== undefined ? own.made / seconds : null;
  return [...found.values()].sort((a, b) => a.replica.localeCompare(b.replica));
}
