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

/**
 * One artifact (`moec compile --target xnnpack`) with a conversation: text in, text out. Slow for the main thread: use it
 * from a background dispatcher. `stop` may be called from any thread.
 *
 * memoryBytes: the most memory of the process; 0 for no budget.
 */
class MoecModel(artifact: File, memoryBytes: Long = 0) : Closeable {
    private val model: Long
    private val session: Long

    @Volatile private var answer = 0L

    init {
        // A file inside an APK cannot be mapped where it lies: install the artifact into filesDir first.
        model = open(artifact.path.toByteArray(), memoryBytes)
        session = session(model)
    }

    /**
     * Answer a conversation; `each` gets every piece of the answer and ends it by returning false. Only what is new in the
     * conversation is computed. temperature null: what the model recommends; limit null: to the end of the context.
     */
    fun answer(
        messages: List<Message>,
        limit: Long? = null,
        temperature: Double? = null,
        seed: Long = 0,
        stops: List<String> = emptyList(),
        each: (String) -> Boolean,
    ) {
        go(promptOf(messages), limit, temperature, seed, stops, 0, each)
    }

    /**
     * As `answer`, with thinking told from text and calls in the model's own form. tools: definitions in OpenAI's form as JSON, the
     * same with every turn; null for none.
     */
    fun answerInParts(
        messages: List<Message>,
        tools: String? = null,
        limit: Long? = null,
        temperature: Double? = null,
        seed: Long = 0,
        stops: List<String> = emptyList(),
        each: (Part) -> Boolean,
    ) {
        val prompt = promptOf(messages, tools)
        val flags = if (tools != null) SEGMENTS or TOOLS else SEGMENTS
        val splitter = splitter(model, prompt, flags)
        fun tell(): Boolean {
            while (true) {
                val found = segment(splitter) ?: return true
                val part = when (found[0][0].toInt()) {
                    0 -> Part.Text(String(found[1]))
                    1 -> Part.Thinking(String(found[1]))
                    else -> Part.Call(String(found[1]), String(found[2]))
                }
                if (!each(part)) return false
            }
        }
        try {
            go(prompt, limit, temperature, seed, stops, flags) { piece ->
                split(splitter, piece.toByteArray())
                tell()
            }
            split(splitter, null)
            tell()
        } finally {
            close(splitter)
        }
    }

    private fun promptOf(messages: List<Message>, tools: String? = null): IntArray {
        val texts = messages.flatMap { message ->
            listOf(message.role, message.content) + message.calls.flatMap { listOf(it.name, it.arguments) }
        }
        val calls = messages.map { it.calls.size }.toIntArray()
        return chat(model, tools?.toByteArray(), texts.map { it.toByteArray() }.toTypedArray(), calls)
    }

    /** Continue a text instead. */
    fun continueText(
        text: String,
        limit: Long? = null,
        temperature: Double? = null,
        seed: Long = 0,
        stops: List<String> = emptyList(),
        each: (String) -> Boolean,
    ) = go(tokenize(model, text.toByteArray()), limit, temperature, seed, stops, 0, each)

    private fun go(
        prompt: IntArray,
        limit: Long?,
        temperature: Double?,
        seed: Long,
        stops: List<String>,
        segments: Int,
        each: (String) -> Boolean,
    ) {
        val texts = stops.map { it.toByteArray() }.toTypedArray()
        val running = generate(model, session, prompt, limit ?: -1, temperature ?: -1.0, seed, texts, segments)
        answer = running
        var wanted = true
        try {
            while (true) {
                val piece = next(running) ?: break
                if (wanted && !each(String(piece))) {
                    wanted = false
                    cancel(running)
                }
            }
        } finally {
            answer = 0
            close(running)
        }
    }

    /** End the answer that runs, from any thread. */
    fun stop() = cancel(answer)

    /** Keep the conversation in a file, for a process that the system may end. */
    fun save(file: File) = save(session, file.path.toByteArray())

    fun restore(file: File) = restore(session, file.path.toByteArray())

    override fun close() {
        close(session)
        close(model)
    }

    companion object {
        private const val SEGMENTS = 8 // MOEC_APP_SEGMENTS and MOEC_APP_TOOLS of moec.h
        private const val TOOLS = 16

        init {
            System.loadLibrary("moec_jni")
        }

        @JvmStatic private external fun open(folder: ByteArray, memory: Long): Long
        @JvmStatic private external fun close(id: Long)
        @JvmStatic private external fun session(artifact: Long): Long
        @JvmStatic private external fun tokenize(artifact: Long, text: ByteArray): IntArray
        @JvmStatic private external fun chat(artifact: Long, tools: ByteArray?, texts: Array<ByteArray>, calls: IntArray): IntArray
        @JvmStatic private external fun generate(
            artifact: Long, session: Long, prompt: IntArray, limit: Long, temperature: Double, seed: Long, stops: Array<ByteArray>,
            segments: Int,
        ): Long
        @JvmStatic private external fun next(generation: Long): ByteArray?
        @JvmStatic private external fun cancel(generation: Long)
        @JvmStatic private external fun splitter(artifact: Long, prompt: IntArray, segments: Int): Long
        @JvmStatic private external fun split(splitter: Long, piece: ByteArray?)
        @JvmStatic private external fun segment(splitter: Long): Array<ByteArray>?
        @JvmStatic private external fun save(session: Long, path: ByteArray)
        @JvmStatic private external fun restore(session: Long, path: ByteArray)
    }
}
