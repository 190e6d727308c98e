package dev.moec

import java.io.Closeable
import java.io.File

/**
 * A turn of a conversation; `role` is "system" (the first one only), "user", "assistant", or "tool" for what a tool answered,
 * after the assistant's turn with its `calls`.
 */
data class Message(val role: String, val content: String, val calls: List<Part.Call> = emptyList())

/** A part of an answer: what is said, what is thought, or a call of a tool with its arguments as JSON. */
sealed interface Part {
    data class Text(val text: String) : Part
    data class Thinking(val text: String) : Part
    data class Call(val name: String, val arguments: String) : Part
}

/** How an answer is generated; null: what the model recommends. docs/assistant.md says what each does. */
data class Settings(
    val limit: Long? = null, // tokens; null: to the end of the context
    val temperature: Double? = null, // 0: the likeliest token
    val topK: Int? = null, // 0: all
    val topP: Double? = null,
    val minP: Double? = null,
    val repeatPenalty: Double? = null,
    val presencePenalty: Double? = null,
    val frequencyPenalty: Double? = null,
    val biases: Map<Int, Double> = emptyMap(), // added to the logits of these tokens; negative infinity rules one out
    val seed: Long = 0,
    val stops: List<String> = emptyList(), // texts that end the answer, which are not shown
    val speculate: Boolean? = null, // whether drafts of several tokens are checked at once; the text is the same
    val topScores: Int? = null, // tells in Stats.scores how likely tokens were, and so many of the likeliest; null: nothing
    val constraint: Constraint? = null, // for one answer
    val onFull: OnFull = OnFull.STOP,
    val keepFirst: Long = 0, // tokens at the beginning that OnFull.DROP_OLDEST leaves: those of a system prompt
    val draft: Conversation? = null, // over a small model of the same tokenizer, which drafts; the text is the same. Use it for nothing else
    val fit: Boolean = false, // leaves the oldest questions of messages out, each with all up to the next, until they and `limit` fit
)

/** What happens when the context is full: the answer ends, or goes on without the oldest half of the tokens, until `limit`. */
enum class OnFull { STOP, DROP_OLDEST }

/**
 * What an answer may be, token by token. It is called by the thread that asked for the answer, between two tokens, and must not use
 * the conversation. An exception ends the answer and comes out of it.
 */
interface Constraint {
    /** Sets bit `t % 32` of `mask[t / 32]` for every token t that may come next, a stop token where the text may end. */
    fun allowed(mask: IntArray)

    /** `token` was taken, one of those allowed. True: the text is complete, and nothing can follow. */
    fun take(token: Int): Boolean
}

/** Why an answer ended. */
enum class End { RUNNING, STOP_TOKEN, STOP_STRING, LENGTH, CONTEXT, CANCELLED, FAILED, COMPLETE }

/** The natural logarithm of the probability that the model gave a token, before settings changed it. */
data class Score(val token: Int, val logProbability: Double)

/** A token of an answer, with the likeliest ones at its place, best first. textBytes: of the answer's text, certain with it. */
data class TokenScore(val taken: Score, val textBytes: Long, val likeliest: List<Score>)

data class Stats(
    val end: End,
    val promptTokens: Long,
    val reusedTokens: Long, // of the prompt, which the conversation held already
    val newTokens: Long,
    val prefillSeconds: Double,
    val decodeSeconds: Double,
    val draftedTokens: Long,
    val acceptedTokens: Long,
    val droppedTokens: Long, // by OnFull.DROP_OLDEST
    val droppedMessages: Int, // by Settings.fit: the first ones behind the system prompt. Leave them out next time
    val scores: List<TokenScore>, // of each token of the answer where Settings.topScores asks for them
) {
    /** The model ended its answer itself, or the constraint lets nothing follow. */
    val isWhole get() = end == End.STOP_TOKEN || end == End.STOP_STRING || end == End.COMPLETE
}

/**
 * Tokens with their caches: text in, text out. A conversation has one answer at a time. `stop` may be called from any thread.
 */
class Conversation internal constructor(private val model: MoecModel, internal val session: Long) : Closeable {
    @Volatile private var running = 0L // the generation, 0 for none
    @Volatile private var stopping = false // since the answer began: a prompt is rendered before there is a generation to cancel

    /**
     * Answer a conversation; `each` gets every piece of the answer and ends it by returning false. Only what is new in the
     * conversation is computed.
     */
    fun answer(messages: List<Message>, settings: Settings = Settings(), each: (String) -> Boolean): Stats {
        stopping = false
        val (prompt, dropped) = promptOf(messages, null, settings)
        return generate(prompt, settings, 0, each).copy(droppedMessages = dropped)
    }

    /**
     * As `answer`, with thinking told from text and calls in the model's own form. tools: definitions in OpenAI's form as JSON, the
     * same with every turn; null for none.
     */
    fun answerInParts(
        messages: List<Message>, tools: String? = null, settings: Settings = Settings(), each: (Part) -> Boolean,
    ): Stats {
        stopping = false
        val (prompt, dropped) = promptOf(messages, tools, settings)
        val flags = if (tools != null) Native.SEGMENTS or Native.TOOLS else Native.SEGMENTS
        val splitter = Native.splitter(model.id, prompt, flags)
        var wanted = true
        fun tell(): Boolean {
            while (wanted) wanted = each(partOf(Native.segment(splitter) ?: return true))
            return false
        }
        try {
            val stats = generate(prompt, settings, flags) { piece ->
                Native.split(splitter, piece.toByteArray())
                tell()
            }
            Native.split(splitter, null)
            tell()
            return stats.copy(droppedMessages = dropped)
        } finally {
            Native.close(splitter)
        }
    }

    /** Continue a text instead. */
    fun continueText(text: String, settings: Settings = Settings(), each: (String) -> Boolean): Stats {
        stopping = false
        return generate(model.tokenize(text), settings, 0, each)
    }

    /** End the answer that runs, from any thread, also while its prompt is rendered; one that is asked for later is not ended. */
    fun stop() {
        stopping = true // before `running` is read: `generate` reads it after it has set that
        Native.cancel(running)
    }

    /** Another conversation that goes on from here by itself. Close it, too. */
    fun fork(): Conversation = Conversation(model, Native.fork(session))

    /** The tokens that it holds. */
    val tokens: IntArray get() = Native.tokens(session)

    /** Forget the tokens from `position` on; 0 for all. */
    fun rewind(position: Long) = Native.rewind(session, position)

    /** Keep the conversation in a file, for a process that the system may end. */
    fun save(file: File) = Native.save(session, file.path.toByteArray())

    /** Go on with one that was saved with the same artifact; the conversation stays as it was where that fails. */
    fun restore(file: File) = Native.restore(session, file.path.toByteArray())

    /**
     * Compute what every conversation with this system prompt and these tools begins with, or read it where it was kept before, and
     * keep it under a name: do so when the application starts. MoecModel.keepPrefixesIn comes first. `stop` ends it, too, with
     * End.CANCELLED: then nothing is kept.
     */
    fun prepare(name: String, system: String?, tools: String? = null): Stats {
        stopping = false
        val stats = generate(model.systemPrompt(system, tools), Settings(limit = 0), 0) { true }
        if (stats.end != End.CANCELLED) keepPrefix(name)
        return stats
    }

    /** Keep the tokens that it holds in the folder of MoecModel.keepPrefixesIn, under a name in place of what had it. */
    fun keepPrefix(name: String? = null) = Native.keepPrefix(session, name?.toByteArray())

    override fun close() = Native.close(session)

    private fun promptOf(messages: List<Message>, tools: String?, settings: Settings): Prompt {
        val texts = messages.flatMap { message ->
            listOf(message.role, message.content) + message.calls.flatMap { listOf(it.name, it.arguments) }
        }
        val calls = messages.map { it.calls.size }.toIntArray()
        val dropped = if (settings.fit) LongArray(1) else null
        val ids = Native.chat(model.id, tools?.toByteArray(), texts.utf8(), calls, settings.limit ?: -1, dropped)
        return Prompt(ids, dropped?.first()?.toInt() ?: 0)
    }

    private fun generate(prompt: IntArray, settings: Settings, segments: Int, each: (String) -> Boolean): Stats {
        val given = settings.over(model.recommended)
        val generation = Native.generate(
            model.id, session, prompt, given.numbers(), given.topK!!, given.speculate!!, given.seed, given.limit ?: -1,
            given.stops.utf8(), given.biases.keys.toIntArray(), given.biases.values.toDoubleArray(), segments, given.topScores ?: -1,
            given.onFull.ordinal, given.keepFirst, given.draft?.session ?: 0, given.constraint,
        )
        running = generation
        var wanted = true
        try {
            if (stopping) Native.cancel(generation)
            while (true) {
                val piece = Native.next(generation) ?: break
                if (wanted && !each(String(piece))) {
                    wanted = false
                    Native.cancel(generation)
                }
            }
            val scores = if (given.topScores == null) DoubleArray(0) else Native.scores(generation)
            return statsOf(Native.stats(generation), scoresOf(scores))
        } finally {
            running = 0
            Native.close(generation)
        }
    }
}

private class Prompt(val ids: IntArray, val dropped: Int) {
    operator fun component1() = ids
    operator fun component2() = dropped
}

private fun List<String>.utf8() = map { it.toByteArray() }.toTypedArray()

private fun Settings.over(other: Settings) = copy(
    temperature = temperature ?: other.temperature, topK = topK ?: other.topK, topP = topP ?: other.topP, minP = minP ?: other.minP,
    repeatPenalty = repeatPenalty ?: other.repeatPenalty, presencePenalty = presencePenalty ?: other.presencePenalty,
    frequencyPenalty = frequencyPenalty ?: other.frequencyPenalty, speculate = speculate ?: other.speculate,
)

private fun Settings.numbers() =
    doubleArrayOf(temperature!!, topP!!, minP!!, repeatPenalty!!, presencePenalty!!, frequencyPenalty!!)

private fun partOf(found: Array<ByteArray>): Part = when (found[0][0].toInt()) {
    0 -> Part.Text(String(found[1]))
    1 -> Part.Thinking(String(found[1]))
    else -> Part.Call(String(found[1]), String(found[2]))
}

private fun statsOf(found: DoubleArray, scores: List<TokenScore>) = Stats(
    end = End.values()[found[0].toInt()], promptTokens = found[1].toLong(), reusedTokens = found[2].toLong(),
    newTokens = found[3].toLong(), prefillSeconds = found[4], decodeSeconds = found[5], draftedTokens = found[6].toLong(),
    acceptedTokens = found[7].toLong(), droppedTokens = found[8].toLong(), droppedMessages = 0, scores = scores,
)

/** Rows of token, rank, logarithm and bytes: of rank 0 for each token that was taken, with the others of its place after it. */
private fun scoresOf(found: DoubleArray): List<TokenScore> {
    val rows = found.toList().chunked(4)
    val taken = rows.indices.filter { rows[it][1] == 0.0 }
    return taken.mapIndexed { i, at ->
        val end = taken.getOrElse(i + 1) { rows.size }
        TokenScore(scoreOf(rows[at]), rows[at][3].toLong(), rows.subList(at + 1, end).map(::scoreOf))
    }
}

private fun scoreOf(row: List<Double>) = Score(row[0].toInt(), row[2])
